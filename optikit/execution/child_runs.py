"""`optikit run` as a child: what a sweep starts for each variant, on this machine or on a node of a cluster.

All that a run needs lies in files that every node sees: the recipe, its output, the store. So a task that a node takes
with it is given to another, which goes on where it stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from optikit.errors import Exit
from optikit.process import child, cpu_share, env_variables, program

GRACE_SECONDS = 20.0
"""How long a run that is stopped may take to end: it has a step's process to end before."""
LOG_BYTES = 2**16
RETRIED = (int(Exit.LOCKED), int(Exit.OUT_OF_MEMORY))
"""What may end well another time, on another node."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run.

    Attributes:
        name: Unique in the sweep.
        recipe: Its recipe.
        base: Where the recipe's relative paths start.
        out: Its output directory.
        log: What it prints, at the end of what is there: one JSON object per event.
        options: Further arguments of `optikit run`.
        store: The store's root, for nodes that name no other.
        seen: A file that has to be there: the proof that the node sees the sweep's folder.
        store_token: Name of a file in the store's locks, for the same proof.
        cpus: Processors that it takes; None is all.
        gpus: GPUs that it takes.
        memory_bytes: What its largest step is expected to take.
    """

    name: str
    recipe: Path
    base: Path
    out: Path
    log: Path
    options: tuple[str, ...] = ()
    store: Path
    seen: Path
    store_token: str
    cpus: int | None = None
    gpus: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        name: Of its task.
        code: Its exit code; None where it was stopped by the sweep.
        message: The last error that it told, in a line.
        seconds: How long it took.
        node: Where.
    """

    name: str
    code: int | None
    message: str = ""
    seconds: float = 0.0
    node: str = ""


class Runner(Protocol):
    """What runs tasks."""

    @property
    def slots(self) -> int:
        """How many tasks run at a time."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Where they run, in words."""

    def start(self, task: Task) -> None:
        """Start a task, or queue it."""

    def ended(self, seconds: float) -> list[Outcome]:
        """Return what ended since the last call; wait for so long at most."""

    def stop(self) -> list[Outcome]:
        """End all that runs, so that it can be resumed, and return how."""


def run(task: Task, between: Callable[[], None] = lambda: None) -> Outcome:
    """Run a task to its end. What `between`, called twenty times a second, raises stops it resumably."""
    started = time.monotonic()
    unseen = _unseen(task)
    outcome = Outcome(name=task.name, code=int(Exit.UNAVAILABLE), message=unseen, node=os.uname().nodename)
    if unseen:
        return outcome
    begun = task.log.stat().st_size if task.log.exists() else 0
    environ = {"OPTIKIT_HOME": str(task.store)} | env_variables.kept()
    with (
        cpu_share.share(task.cpus),
        child.started(command(task), environ=environ, log=task.log, grace_s=GRACE_SECONDS) as process,
    ):
        code = process.watch(task.name, between=between)
    message = _error(task.log, begun) if code else ""
    return replace(outcome, code=_positive(code), message=message, seconds=time.monotonic() - started)


def command(task: Task) -> list[str]:
    """Return what a shell would be given."""
    arguments = ["run", str(task.recipe), "--base", str(task.base), "--out", str(task.out), "--progress", "json"]
    return program.module("optikit", *arguments, *task.options)


def _unseen(task: Task) -> str:
    """Say which folder this node doesn't share with the one that sent the task; "" where it has all."""
    home = Path(os.environ.get("OPTIKIT_HOME") or task.store)
    if not task.seen.is_file():
        return f"{task.seen.parent} isn't shared with this node"
    if not (home / "locks" / task.store_token).is_file():
        return f"the store {home} isn't the sweep's {task.store}: set OPTIKIT_HOME on every node to one shared folder"
    return ""


def _positive(code: int) -> int:
    """Return an exit code as a shell has it."""
    return code if code >= 0 else 128 - code


def _error(log: Path, begun: int) -> str:
    """Return the last error that a run told."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begun if begun <= size else 0, size - LOG_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    told = [line for line in lines if line.startswith("error: ") or ": error: " in line]
    return told[-1].removeprefix("error: ") if told else ""


class _StoppedError(Exception):
    """The sweep wants a run to end."""


class InTurn:
    """Runs one task after another, here, while `ended` is called."""

    slots = 1

    def __init__(self, between: Callable[[], None]) -> None:
        self._waiting: list[Task] = []
        self._between = between
        self.nodes = (os.uname().nodename,)

    def start(self, task: Task) -> None:
        """See `Runner`."""
        self._waiting.append(task)

    def ended(self, seconds: float) -> list[Outcome]:
        """See `Runner`; it takes as long as the run does, unless `between` raises `stopped()`."""
        if not self._waiting:
            time.sleep(seconds)
            return []
        task, begun = self._waiting.pop(0), time.monotonic()
        try:
            return [run(task, self._between)]
        except _StoppedError:
            return [Outcome(name=task.name, code=None, seconds=time.monotonic() - begun, node=self.nodes[0])]

    def stop(self) -> list[Outcome]:
        """See `Runner`."""
        found = [Outcome(name=task.name, code=None) for task in self._waiting]
        self._waiting = []
        return found


def stopped() -> Exception:
    """Return what `between` raises to end the run that it watches, as an outcome and no error."""
    return _StoppedError()
