"""A SkyPilot task: a managed job on spot machines of any cloud, the store in a bucket that is mounted.

Read: https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

from __future__ import annotations

import shlex

from optikit.deploy.jobs import Job
from optikit.deploy.kubernetes import dumped

SUMMARY = "SkyPilot: a managed job on spot machines, the store in a bucket"
CHECKED = "parsed by SkyPilot's own Task.from_yaml"
VOLUME = "/store"
ACCELERATORS = {
    "t4": "T4", "a10g": "A10G", "l4": "L4", "l40s": "L40S", "a100-40": "A100", "a100-80": "A100-80GB",
    "h100": "H100", "h200": "H200", "b200": "B200",
}  # fmt: skip
"""Targets → SkyPilot's names."""


def refusal(job: Job) -> tuple[str, str]:
    """Return why a job can't go there."""
    if job.target.device != "cpu" and not _accelerator(job):
        known = ", ".join(ACCELERATORS)
        return f"SkyPilot's name for the accelerators of {job.target.name} isn't known", f"name one of {known}"
    return "", ""


def _accelerator(job: Job) -> str:
    """Return SkyPilot's name of the target's accelerator: by the target's own name, or by that of what it holds."""
    product = job.target.accelerator.lower().replace(" ", "-").removesuffix("gb")
    return ACCELERATORS.get(job.target.name) or ACCELERATORS.get(product, "")


def files(job: Job) -> dict[str, str]:
    """Return the task."""
    resources = {
        "cpus": f"{job.cpus}+",
        "memory": f"{-(-job.memory_mib // 1024)}+",
        "disk_size": max(50, job.disk_gib),
        "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 2},
        **({"accelerators": f"{_accelerator(job)}:{job.gpus}"} if job.gpus else {}),
        **({"image_id": f"docker:{job.image}"} if job.image else {}),
    }
    install = f"pip install --quiet {shlex.quote(job.install)}"
    task = {
        "name": job.name,
        "workdir": ".",
        "resources": resources,
        "envs": {"OPTIKIT_HOME": "~/optikit-home", "OPTIKIT_REMOTE_STORE": f"file://{VOLUME}",
                 "OPTIKIT_REMOTE_PUSH": "1", **job.environment},
        "file_mounts": {VOLUME: {"name": f"optikit-{job.name}", "mode": "MOUNT", "persistent": True}},
        "setup": install,
        "run": f"{job.run('.', '$HOME')}\ncp -r ~/{job.name}/out {VOLUME}/\n",
    }  # fmt: skip
    return {"task.yaml": dumped(task)}


def command(job: Job) -> str:
    """Return how it is launched."""
    return f"sky jobs launch --name {job.name} task.yaml"


def again(job: Job) -> str:
    """Say who starts it again."""
    return (
        "SkyPilot starts it again on another machine when a spot machine is taken away. Buckets have no locks, so the\n"
        f"store is on the machine's disk, and every finished step goes to the bucket `optikit-{job.name}`\n"
        "(`OPTIKIT_REMOTE_STORE`): the next attempt fetches it."
    )
