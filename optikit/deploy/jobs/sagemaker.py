"""A SageMaker training job: managed spot instances, the store in its checkpoints.

A processing job has neither spot instances nor checkpoints, so it couldn't go on where it stopped.
Read: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTrainingJob.html
"""

from __future__ import annotations

import json

from optikit.deploy.jobs import RECIPE, Job
from optikit.deploy.sagemaker import BUCKET, ROLE, SMALLEST

SUMMARY = "SageMaker: a training job on spot instances, checkpointed"
CHECKED = "validated by botocore against SageMaker's own service model"
FOLDER, VOLUME, LIBRARIES = "/opt/ml/input/data/recipe", "/opt/ml/checkpoints", "/opt/optikit"
IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.8.0-{kind}-ubuntu22.04-sagemaker"
"""AWS's public deep learning containers."""
CPU_SIZES = (("xlarge", 4), ("2xlarge", 8), ("4xlarge", 16), ("8xlarge", 32), ("12xlarge", 48), ("24xlarge", 96))
"""ml.m5: virtual processors, each with 4 GiB."""
MOST_SECONDS = 28 * 24 * 3600


def instance(job: Job) -> str:
    """Return the instance type: the target's own, the smallest with its GPU, or processors for time and memory."""
    name = job.target.name
    if name.startswith("ml."):
        return name
    if job.target.device != "cpu":
        return f"ml.{name}" if "." in name else SMALLEST.get(name, "")
    fitting = (size for size, cpus in CPU_SIZES if cpus >= job.cpus and cpus * 4 * 2**30 >= job.memory_bytes)
    return f"ml.m5.{size}" if (size := next(fitting, "")) else ""


def refusal(job: Job) -> tuple[str, str]:
    """Return why a job can't go there."""
    found = instance(job)
    if not found:
        return f"no instance type of SageMaker is known for {job.target.name}", "name one as the target: ml.g6.xlarge"
    if found.startswith("ml.inf"):
        return f"training jobs don't run on {found}", "use --to k8s"
    return "", ""


def files(job: Job) -> dict[str, str]:
    """Return the request, and the script that uploads the recipe and sends it."""
    kind = "cpu-py312" if job.target.device == "cpu" else "gpu-py312-cu129"
    seconds = min(job.seconds, MOST_SECONDS)
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/{job.name}/recipe/"}
    request = {
        "TrainingJobName": job.name,
        "RoleArn": ROLE,
        "AlgorithmSpecification": {
            "TrainingImage": job.image or IMAGE.format(kind=kind),
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["sh", f"{FOLDER}/run.sh"],
        },
        "InputDataConfig": [{"ChannelName": "recipe", "DataSource": {"S3DataSource": source}}],
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/{job.name}/output/"},
        "ResourceConfig": {"InstanceType": instance(job), "InstanceCount": 1, "VolumeSizeInGB": job.disk_gib},
        "EnableManagedSpotTraining": True,
        "CheckpointConfig": {"S3Uri": f"s3://{BUCKET}/{job.name}/store/", "LocalPath": VOLUME},
        "StoppingCondition": {
            "MaxRuntimeInSeconds": seconds,
            "MaxWaitTimeInSeconds": min(2 * seconds, MOST_SECONDS),
        },
        "Environment": {"OPTIKIT_HOME": f"{VOLUME}/home", **job.environment},
    }
    names = " ".join(sorted({"run.sh", *(path.partition("/")[0] for path in job.files)}))
    return {
        "job.json": json.dumps(request, indent=2) + "\n",
        "run.sh": f"set -e\n{job.installed(LIBRARIES)}\nexec {LIBRARIES}/venv/bin/{job.run(FOLDER, VOLUME)}\n",
        "submit.sh": SUBMIT.format(name=job.name, names=names),
    }


SUBMIT = """\
#!/bin/sh
# Upload the recipe and start the job: sh submit.sh BUCKET ROLE-ARN. A job's name is used once, so the time is added.
set -eu
bucket=${{1:?a bucket}} role=${{2:?a role}}
cd "$(dirname "$0")"
for each in {names}; do
  if [ -d "$each" ]; then aws s3 cp --recursive "$each" "s3://$bucket/{name}/recipe/$each"
  else aws s3 cp "$each" "s3://$bucket/{name}/recipe/$each"; fi
done
sed -e "s|arn:aws:iam::123456789012:role/CHANGE-ME|$role|" -e "s|CHANGE-ME/|$bucket/|" \\
    -e "/TrainingJobName/s|{name}|{name}-$(date +%s)|" job.json > job.filled.json
aws sagemaker create-training-job --cli-input-json file://job.filled.json
"""


def command(job: Job) -> str:  # noqa: ARG001 - the contract's signature
    """Return how it is started."""
    return "sh submit.sh BUCKET arn:aws:iam::ACCOUNT:role/NAME"


def again(job: Job) -> str:
    """Say who starts it again."""
    return (
        "SageMaker starts it again on another spot instance, with the store as it was copied from\n"
        f"`/opt/ml/checkpoints` to `s3://BUCKET/{job.name}/store/`; the same command after a failure goes on from\n"
        f"there, too. `{RECIPE}` and its texts are uploaded first."
    )
