#!/bin/sh
# Upload the recipe and start the job: sh submit.sh BUCKET ROLE-ARN. A job's name is used once, so the time is added.
set -eu
bucket=${1:?a bucket} role=${2:?a role}
cd "$(dirname "$0")"
for each in recipe.yaml run.sh; do
  if [ -d "$each" ]; then aws s3 cp --recursive "$each" "s3://$bucket/quickstart/recipe/$each"
  else aws s3 cp "$each" "s3://$bucket/quickstart/recipe/$each"; fi
done
sed -e "s|arn:aws:iam::123456789012:role/CHANGE-ME|$role|" -e "s|CHANGE-ME/|$bucket/|" \
    -e "/TrainingJobName/s|quickstart|quickstart-$(date +%s)|" job.json > job.filled.json
aws sagemaker create-training-job --cli-input-json file://job.filled.json
