"""Other programs at work for a compile stage, each in a process of its own, where a crash harms nobody.

`python -m optikit.process.program PARENT MODULE ARGUMENTS…` runs a module that dies with its parent: a worker
that is killed must not leave a builder behind that goes on writing into a directory nobody waits for.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from typing import TYPE_CHECKING

from optikit.errors import OutOfMemoryError, StageFailedError
from optikit.process.child import die_with_parent

if TYPE_CHECKING:
    from pathlib import Path

    from optikit.stage import Job

LOG_TAIL = 12
"""Lines of a child's log that an error message quotes."""
MODULE = "optikit.process.program"
"""This module: as the program that is started, its own name is another."""


def environment(job: Job) -> dict[str, str]:
    """Return the environment of a child: no hub, no remote cache, this many threads."""
    caches = {"HF_HOME": str(job.scratch / "hf"), "XDG_CACHE_HOME": str(job.scratch / "cache")}
    threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **offline, **caches, **threads}


def program(module: str) -> list[str]:
    """Return the command that runs a module in a child that dies with this process.

    -P: nothing in the working directory is imported by accident.
    """
    return [sys.executable, "-P", "-m", MODULE, str(os.getpid()), module]


def trial(what: str, module: str, job: Job, *arguments: str) -> str:
    """Let a module decode from `job.dest`; return what it printed: one line of JSON.

    Args:
        what: What it does, for messages.
        module: It gets `job.dest` and the arguments.
        job: Where to read, and to keep its log.
        arguments: Further arguments.

    Raises:
        StageFailedError: It crashed or refused.
        OutOfMemoryError: It was killed.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    log = job.scratch / "trial.log"
    command = [*program(module), str(job.dest.resolve()), *arguments]
    with log.open("w", encoding="utf-8") as kept:
        child = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=kept, text=True, env=environment(job), cwd=job.scratch, check=False
        )
    require_success(what, child.returncode, log)
    return child.stdout.strip().splitlines()[-1]


def require_success(what: str, code: int, log: Path) -> None:
    """Turn a child's exit code into an error that quotes its log.

    Raises:
        StageFailedError: If it isn't zero.
        OutOfMemoryError: If the kernel killed it.
    """
    if code == 0:
        return
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    tail = "\n".join(lines[-LOG_TAIL:])
    if code == -9 or "MemoryError" in tail or "std::bad_alloc" in tail:
        raise OutOfMemoryError(f"{what} ran out of memory", fix="give the run more memory, or a smaller model")
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    raise StageFailedError(f"{what} {how}; its log ends:\n{tail}", fix=f"the whole log is {log}")


def main(parent: int, module: str, *arguments: str) -> None:
    """Run `module` as the program, unless the process `parent` has died already."""
    die_with_parent()
    if os.getppid() == parent:  # else it died before the kernel was told
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
