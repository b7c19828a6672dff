"""A Kubernetes Job: recipe in a config map, store on a volume claim, restarted by the job controller.

Read: https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy
"""

from __future__ import annotations

import base64
from typing import Any

from optikit.deploy.jobs import FINAL, Job
from optikit.deploy.kubernetes import dumped

SUMMARY = "Kubernetes: a Job with a volume claim"
CHECKED = "parsed by kubernetes-validate against the schemas of Kubernetes 1.33"
FOLDER, VOLUME = "/job", "/store"
MOST_BYTES = 900_000
"""Of a config map: a mebibyte is etcd's limit, and base64 and names take their share."""
ATTEMPTS = 6


def refusal(job: Job) -> tuple[str, str]:
    """Return why a config map can't hold the recipe's files."""
    size = sum(map(len, job.files.values()))
    if size * 4 // 3 > MOST_BYTES:
        message = f"the recipe's files have {size} bytes, and a config map holds {MOST_BYTES * 3 // 4}"
        return message, "name texts as hf: or pypi: sources, or put them on the volume and pass --shared its path"
    return "", ""


def files(job: Job) -> dict[str, str]:
    """Return one manifest: config map, volume claim, job."""
    name = {"name": job.name}
    keys = {path: f"file-{number}" for number, path in enumerate(job.files)}
    data = {keys[path]: base64.b64encode(content).decode() for path, content in job.files.items()}
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": f"{job.disk_gib}Gi"}}}
    volumes = [
        {"name": "job", "configMap": {**name, "items": [{"key": key, "path": path} for path, key in keys.items()]}},
        {"name": "store", "persistentVolumeClaim": {"claimName": job.name}},
    ]
    pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 60}
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "optikit", "operator": "In", "values": list(FINAL)}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    spec = {
        "backoffLimit": ATTEMPTS,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": {**pod, "containers": [_container(job)], "volumes": volumes}},
    }
    manifest = dumped(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "binaryData": data},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": name, "spec": claim},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": name, "spec": spec},
    )
    return {"job.yaml": manifest}


def _container(job: Job) -> dict[str, Any]:
    limits: dict[str, str] = {"memory": f"{job.memory_mib}Mi"}
    if job.gpus:
        limits["nvidia.com/gpu"] = str(job.gpus)
    elif job.target.device == "neuron":
        limits["aws.amazon.com/neuron"] = str(job.target.count)
    environment = {"OPTIKIT_HOME": f"{VOLUME}/home", **job.environment}
    line = f"set -e; {job.installed(VOLUME)}; exec {VOLUME}/venv/bin/{job.run(FOLDER, VOLUME)}"
    return {
        "name": "optikit",
        "image": job.python_image,
        "command": ["sh", "-c", line],
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "resources": {"requests": {"cpu": str(job.cpus), **limits}, "limits": limits},
        "volumeMounts": [
            {"name": "job", "mountPath": FOLDER, "readOnly": True},
            {"name": "store", "mountPath": VOLUME},
        ],
    }


def command(job: Job) -> str:
    """Return how it is created and followed."""
    return f"kubectl apply -f job.yaml && kubectl logs -f job/{job.name} --pod-running-timeout=10m"


def again(job: Job) -> str:
    """Say who starts it again."""
    return (
        f"The job controller starts a new pod up to {ATTEMPTS} times, evictions not counted; the store on the claim\n"
        f"`{job.name}` stays. Exit codes {', '.join(map(str, FINAL))} end the job: trying again would end the same."
    )
