"""Upload the artifact and create the endpoint: python deploy.py --bucket NAME --role ARN. It needs boto3.

--dry-run prints every upload and request instead. Each can be sent again: what is there already is left alone.
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1]


def uploads(prefix):
    """Yield (file, key, text or None): where each file of the artifact goes; text replaces what is in the file."""
    for name, place in json.loads((HERE / "uploads.json").read_text()):
        source = OUT / name
        paths = [source] if source.is_file() else sorted(each for each in source.rglob("*") if each.is_file())
        for path in paths:
            inner = "" if source.is_file() else path.relative_to(source).as_posix()
            key = "/".join(part for part in (prefix, place, inner) if part)
            yield path, key, heads_config(path) if key == f"{prefix}/config.json" else None


def heads_config(path):
    """Return the configuration of heads with the place of their model; None where there are none."""
    base = HERE / "base.txt"
    if not base.is_file():
        return None
    found = json.loads(path.read_text())
    return json.dumps({**found, "base_model_name_or_path": base.read_text().strip()}, indent=2)


def requests(bucket, role):
    """Return the requests with bucket and role filled in."""
    found = {}
    for name in ("create_model", "create_endpoint_config", "create_endpoint"):
        text = (HERE / f"{name}.json").read_text().replace("s3://CHANGE-ME/", f"s3://{bucket}/")
        found[name] = json.loads(text)
    found["create_model"]["ExecutionRoleArn"] = role
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--role", required=True, help="ARN of a role that may read the bucket")
    parser.add_argument("--region")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/.+", given.role):
        sys.exit(f"--role {given.role} is no role's ARN: arn:aws:iam::ACCOUNT:role/NAME")
    asked = requests(given.bucket, given.role)
    prefix = asked["create_model"]["ModelName"]
    if given.dry_run:
        for path, key, text in uploads(prefix):
            print(f"upload {path.relative_to(OUT)} -> s3://{given.bucket}/{key}" + (" (edited)" if text else ""))
        print(json.dumps(asked, indent=2))
        return
    import boto3

    store = boto3.client("s3", region_name=given.region)
    for path, key, text in uploads(prefix):
        print(f"upload {key}")
        if text is None:
            store.upload_file(str(path), given.bucket, key)
        else:
            store.put_object(Bucket=given.bucket, Key=key, Body=text.encode())
    client = boto3.client("sagemaker", region_name=given.region)
    for name, values in asked.items():
        try:
            getattr(client, name)(**values)
            print(f"{name}: {prefix}")
        except client.exceptions.ClientError as error:
            if "already exist" not in str(error):
                raise
            print(f"{name}: {prefix} is there already")
    client.get_waiter("endpoint_in_service").wait(EndpointName=prefix)
    print(f"in service: {prefix}")


if __name__ == "__main__":
    main()
