"""Other programs, each in a process of its own, where a crash harms nobody: run to their end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optikit.process import env_variables
from optikit.process.child import started

if TYPE_CHECKING:
    from optikit.stage import Job


@dataclass(frozen=True)
class Done:
    """How a short command ended: its exit code, negative for a signal, and what it printed."""

    code: int
    output: str
    errors: str


def run(
    command: Sequence[str],
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
    seconds: float | None = None,
) -> Done:
    """Run a short command whose output is an answer; what doesn't exist ends with exit code 127.

    Args:
        command: Program and arguments.
        environ: Its environment; None is what a child may see of this one's.
        directory: Where it runs; None is here.
        seconds: How long it may take; None is as long as it wants.

    Raises:
        TimeoutError: It took longer, and was ended.
    """
    with started(command, environ=environ, directory=directory, piped=True) as child:
        output, errors = child.finish(seconds)
        return Done(child.code or 0, output, errors)


def perform(
    what: str,
    command: Sequence[str],
    *,
    log: Path,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Run a program that works for long, all that it prints into a log of its own.

    Args:
        what: It, for messages.
        command: Program and arguments.
        log: Begun anew.
        environ: Its environment; None is what a child may see of this one's.
        directory: Where it runs; None is here.
        between: Called again and again meanwhile.

    Raises:
        OptikitError: It failed, crashed, or ran out of memory or disk; see `failure.death`.
    """
    log.unlink(missing_ok=True)
    with started(command, environ=environ, log=log, directory=directory) as child:
        if child.watch(what, between=between):
            raise child.death(what)


def module(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in this interpreter.

    -P: nothing in the working directory is imported by accident.
    """
    return [sys.executable, "-P", "-m", name, *arguments]


def environment(job: Job) -> dict[str, str]:
    """Return the environment of a program that works for a job: no hub, no git, caches of its own, so many threads."""
    caches = {"HF_HOME": str(job.scratch / "hf"), "XDG_CACHE_HOME": str(job.scratch / "cache")}
    return (
        env_variables.kept()
        | env_variables.OFFLINE
        | env_variables.NO_REPOSITORY
        | caches
        | env_variables.threads(job.threads)
        | {"PYTHONUNBUFFERED": "1"}
    )


def trial(what: str, name: str, job: Job, *arguments: str) -> str:
    """Let a module decode from `job.dest`; return what it printed: one line of JSON.

    Args:
        what: What it does, for messages.
        name: The module; it gets `job.dest` and the arguments.
        job: Where to read, and to keep its log.
        arguments: Further arguments.

    Raises:
        OptikitError: It refused, crashed, or ran out of memory or disk; see `failure.death`.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    log = job.scratch / "trial.log"
    log.unlink(missing_ok=True)
    command = module(name, str(job.dest.resolve()), *arguments)
    with started(command, environ=environment(job), log=log, directory=job.scratch, piped=True) as child:
        output, _ = child.finish()
        if child.code:
            raise child.death(what)
    return output.strip().splitlines()[-1]
