"""A Slurm batch script that requeues itself: on preemption and before its time ends.

Read: sbatch(1), Slurm 22.05
"""

from __future__ import annotations

import shlex

from optikit.deploy.jobs import Job

SUMMARY = "Slurm: a batch script that requeues itself"
CHECKED = "directives parsed by `sbatch --test-only` of Slurm 22.05; run here with stand-ins for optikit and scontrol"
GRACE_SECONDS = 180
"""Between Slurm's signal and the end of the time."""


def refusal(job: Job) -> tuple[str, str]:
    """Return why a job can't go there."""
    if job.target.device == "neuron":
        return f"no resource of Slurm is called Neuron everywhere, and {job.target.name} has it", "use --to k8s"
    return "", ""


def files(job: Job) -> dict[str, str]:
    """Return the script."""
    hours, rest = divmod(job.seconds, 3600)
    asked = {
        "job-name": job.name,
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": str(job.cpus),
        "mem": f"{job.memory_mib}M",
        **({"gpus": str(job.gpus)} if job.gpus else {}),
        "time": f"{hours:02d}:{rest // 60:02d}:00",
        "signal": f"B:TERM@{GRACE_SECONDS}",
        "open-mode": "append",
        "output": f"{job.name}-%j.log",
    }
    directives = "".join(f"#SBATCH --{name}={value}\n" for name, value in asked.items())
    exported = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.environment.items())
    return {
        "job.sh": SCRIPT.format(
            directives=directives,
            exported=exported,
            installed=job.installed("$STORE"),
            run=job.run("$SLURM_SUBMIT_DIR", "$STORE"),
        )
    }


SCRIPT = """\
#!/bin/bash
{directives}#SBATCH --requeue
# STORE is a directory that every node sees and that outlives the job; another one: STORE=/nfs/store sbatch job.sh
STORE=${{STORE:-$SLURM_SUBMIT_DIR/store}}
export OPTIKIT_HOME="$STORE/home"
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
{exported}mkdir -p "$STORE" || exit 73
{installed} || exit 69
PATH="$STORE/venv/bin:$PATH"

again() {{  # the time is nearly over, or somebody more urgent wants the node: stop well, and queue again
  trap '' TERM
  kill -TERM "$run" 2>/dev/null
  wait "$run"
  scontrol requeue "$SLURM_JOB_ID"
  exit 143
}}
trap again TERM
{run} &
run=$!
wait "$run"
"""


def command(job: Job) -> str:  # noqa: ARG001 - the contract's signature
    """Return how it is submitted."""
    return "sbatch job.sh"


def again(job: Job) -> str:  # noqa: ARG001 - the contract's signature
    """Say who starts it again."""
    return (
        "Slurm requeues it when it is preempted or its node fails (`--requeue`), and the script does so itself\n"
        f"{GRACE_SECONDS} s before its time ends. The store in `$STORE` stays: the next attempt goes on after the\n"
        "last finished block."
    )
