"""Finishes what a compile stage emitted, where its tools are: `optikit run --resume` on the device.

The folder that was written then is copied, its own script is run in the copy, and what that leaves is the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from optikit.process import env_variables, program, server
from optikit.stage import EMITTED, Job

MANIFEST = "artifact.json"
GPU = Path("/dev/nvidiactl")
LOG = "finish.log"


def lacking(tools: Sequence[str]) -> str:
    """Return what isn't to be found on PATH, as words; "" where all is."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return f"{' and '.join(missing)} can't be found on PATH" if missing else ""


def unpack(job: Job) -> None:
    """Copy the emitted folder to `job.dest`."""
    shutil.copytree(
        job.inputs[EMITTED], job.dest, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST), symlinks=False
    )


def environment(job: Job, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a folder's script: what this process may pass on, and where the model lies."""
    return {**env_variables.kept(), "MODEL": str(job.source.resolve()), **(more or {})}


def script(what: str, command: Sequence[str], job: Job, more: Mapping[str, str] | None = None) -> str:
    """Run a script of the folder in `job.dest`; return the last line that it printed.

    Raises:
        OptikitError: It failed, crashed, or ran out of memory or disk; its log is quoted.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    log = job.scratch / LOG
    program.perform(what, command, log=log, environ=environment(job, more), directory=job.dest)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def asked(serve: Sequence[str], ask: Sequence[str], job: Job, more: Mapping[str, str]) -> str:
    """Run one script of the folder while another asks it something; return the last line of the answer.

    Raises:
        StageFailedError: The second failed; its log is quoted. The first one's is server.log beside it.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    log = job.scratch / "server.log"
    with server.running("the server", serve, environ=environment(job, more), log=log, directory=job.dest):
        return script("asking the server", ask, job, more)


def drop_links(directory: Path) -> None:
    """Remove the links to weights that a script made: they lie in the model's own artifact."""
    for path in directory.rglob("*"):
        if path.is_symlink():
            path.unlink()
