"""Plan → artifacts: for every step, cache or child process or error, in one loop.

A step runs in a process of its own (own session, dies with its parent), so that running out of memory, crashing
natively and hanging have names and exit codes, and the memory of one step is free again before the next begins.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from optikit import environments, host, stages
from optikit.errors import InterruptError, OptikitError, StageFailedError, TerminatedError
from optikit.execution import check_backend, supervise
from optikit.fileio import write_json
from optikit.process.failure import raise_failure
from optikit.stage import EMITTED, Emitting
from optikit.store.sources import require_unchanged
from optikit.store.store import Artifact, Manifest, Store, cache_key

if TYPE_CHECKING:
    from optikit.plan import Plan, Step
    from optikit.progress import Progress, Status


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run, as the command line says; none of it changes a result."""

    until: str | None = None
    """Name of the last step to run; None runs all of them."""
    lock_timeout: float | None = None
    offline: bool = False
    """Managed environments that aren't built yet are not fetched."""
    threads: int = field(default_factory=host.threads)
    resume: bool = False
    """Do here what an earlier run, or this one, leaves to another machine: where its tools are."""
    ranks: int = 1
    """Processes that share the calibration of a prune or quantize step; each gets its part of the threads."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What a run left: artifacts by step key, and by step name whether it was executed or cached."""

    artifacts: Mapping[str, Artifact]
    statuses: Mapping[str, Status]


class _Signals:
    """Turns SIGINT and SIGTERM into errors that unwind the loop, so that a child is always stopped on the way out."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._raise) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @staticmethod
    def _raise(number: int, _: FrameType | None) -> None:
        again = "run the same command again: finished steps and blocks are kept"
        if number == signal.SIGINT:
            raise InterruptError("interrupted", fix=again)
        raise TerminatedError("terminated", fix=again)


def execute(
    plan: Plan,
    store: Store,
    progress: Progress,
    settings: Settings,
    finished: Callable[[Step, Mapping[str, Artifact]], None] = lambda *_: None,
) -> Execution:
    """Run every step of a plan that isn't in the store yet; `finished` is told of each, with all artifacts so far.

    Raises:
        OptikitError: The first step that fails, by the table of exit codes; finished steps stay in the store.
    """
    executor = _Executor(plan, store, progress, settings)
    steps = _until(plan.order, settings.until)
    progress.plan([step.name for step in steps])
    with _Signals():
        for step in steps:
            executor.step(step)
            finished(step, executor.artifacts)
    return Execution(artifacts=executor.artifacts, statuses=executor.statuses)


def _until(steps: tuple[Step, ...], name: str | None) -> tuple[Step, ...]:
    if name is None:
        return steps
    return steps[: [step.name for step in steps].index(name) + 1]


@dataclass(frozen=True)
class _Executor:
    """A plan on its way: what is made so far, and how the next step is made."""

    plan: Plan
    store: Store
    progress: Progress
    settings: Settings
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """By step key."""
    statuses: dict[str, Status] = field(default_factory=dict)
    """By step name."""
    reread: list[str] = field(default_factory=list)
    """Digest of the model that the recipe names, once all of it was read again."""

    def step(self, step: Step) -> None:
        """Bring about what a step makes, and tell of it."""
        self.progress.start(step.name)
        try:
            artifact, status = self._made(step)
        except OptikitError:
            self.progress.finish(step.name, "failed", 0.0, 0.0)
            raise
        self.artifacts[step.key], self.statuses[step.name] = artifact, status
        self.progress.finish(step.name, status, artifact.manifest.seconds, artifact.manifest.peak_memory_mib)

    def _made(self, step: Step) -> tuple[Artifact, Status]:
        """Return what a step made, now or before; of what was emitted, what became of it where its tools are."""
        stage = stages.load(step.verb, step.method, step.backend)
        if not isinstance(stage, Emitting):
            return self._kept(step)
        finished = replace(step, key=cache_key(finishes=step.key))
        found = self.store.find(finished.key)
        if found is not None:
            return found, "cached"
        artifact, status = self._kept(step)
        if status != "emitted" or not self.settings.resume:
            return artifact, status
        why = stage.absent(step.options)
        if why:
            self.progress.note(f"{step.name} stays emitted: {why}")
            return artifact, status
        return self._kept(finished, emitted=artifact.path)

    def _kept(self, step: Step, emitted: Path | None = None) -> tuple[Artifact, Status]:
        """Return what is in the store, or what one process at a time makes."""
        found = self.store.find(step.key)
        if found is not None:
            return found, _status(found, "cached")
        with self.store.lock(step.key, timeout=self.settings.lock_timeout, waiting=self.progress.note):
            found = self.store.find(step.key)  # whoever held the lock may have done the work
            if found is not None:
                return found, _status(found, "cached")
            artifact = self._perform(step, emitted)
            return artifact, _status(artifact, "executed")

    def _perform(self, step: Step, emitted: Path | None) -> Artifact:
        """Do a step in a process of its own and keep its result; with `emitted`, finish that folder."""
        self._require_intact(step)
        directory = self.store.job_dir(step.key)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        dest = self.store.staging(step.key)
        request = self._request(step, emitted)
        places = {"dest": str(dest), "scratch": str(self.store.scratch(step.key))}
        write_json(directory / "request.json", request | places)
        try:
            response = self._response(step, directory)
            if not response["ok"]:
                raise_failure(response, step=step.name, log=directory / "log.txt")
            if step.backend != stages.OURS and step.writes == "model":
                check_backend.require(step.name, step.backend, dest, step.after)
            artifact = self.store.commit(step.key, dest, _manifest(step, request, response))
        finally:
            shutil.rmtree(dest, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)
        return artifact

    def _require_intact(self, step: Step) -> None:
        """Read again, every byte, what a step is about to be made of."""
        for key in {step.source, *step.inputs.values()}:
            if key:
                self.store.require_intact(self.artifacts[key])
            elif not self.reread:
                require_unchanged(self.plan.model, self.store)
                self.reread.append(self.plan.model.digest)

    def _response(self, step: Step, directory: Path) -> dict[str, Any]:
        """Do a step in the interpreter that it asks for, and return what its process answered."""
        timeout, note = self.plan.recipe.timeout, self.progress.note
        observe = partial(self.progress.update, step.name)
        if step.environment is None:
            return supervise.respond(step.name, directory, timeout=timeout, observe=observe, note=note)
        with environments.use(
            step.environment,
            self.store,
            offline=self.settings.offline,
            note=note,
            progress=observe,
        ) as environment:
            try:
                response = supervise.respond(
                    step.name, directory, timeout=timeout, observe=observe, note=note, environment=environment
                )
            except StageFailedError:
                environment.require(step.name)
                raise
            if not response["ok"]:
                environment.require(step.name)
            return response

    def _path(self, key: str) -> str:
        """Return where an artifact lies; "" is the model that the recipe names."""
        return str(self.artifacts[key].path if key else self.plan.model.path)

    def _request(self, step: Step, emitted: Path | None) -> dict[str, Any]:
        """Return what the worker is told: what the stage declared to use, and nothing else."""
        ranks = self.settings.ranks if step.split and step.environment is None else 1
        inputs = {role: self._path(key) for role, key in step.inputs.items()} | dict(step.files)
        uses_target = stages.load(step.verb, step.method, step.backend).USES_TARGET
        return {
            "verb": step.verb,
            "method": step.method,
            "backend": step.backend,
            "options": step.options.model_dump(mode="json"),
            "source": self._path(step.source),
            "inputs": inputs | ({EMITTED: str(emitted)} if emitted else {}),
            "finish": emitted is not None,
            "calibration": step.calibration,
            "seed": self.plan.recipe.seed,
            "device": self.plan.device,
            "threads": max(1, self.settings.threads // ranks),
            "ranks": ranks,
            "max_memory_bytes": self.plan.max_memory_bytes,
            "target": asdict(self.plan.target) if uses_target else None,
        }


def _status(artifact: Artifact, done: Status) -> Status:
    """Say `emitted` of files whose work is left to another machine, whether written now or before."""
    return "emitted" if artifact.manifest.facts.get(EMITTED) else done


def _manifest(step: Step, request: Mapping[str, Any], response: Mapping[str, Any]) -> Manifest:
    return Manifest(
        key=step.key,
        verb=step.verb,
        method=step.method,
        backend=step.backend,
        options=request["options"],
        parent=step.source,
        inputs=dict(step.inputs),
        traits=tuple(sorted(step.after.traits)),
        facts=response["facts"],
        seconds=response["seconds"],
        peak_memory_mib=response["peak_memory_mib"],
        versions=response["versions"],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
