"""Plan → artifacts: for every step, cache or child process or error, in one loop.

A step runs in a process of its own (own session, dies with its parent), so that running out of memory, crashing
natively and hanging have names and exit codes, and the memory of one step is free again before the next begins.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from optikit import environments, host, stages
from optikit.errors import IntegrityError, InterruptError, OptikitError, TerminatedError
from optikit.execution import check_backend, supervise
from optikit.fileio import write_json
from optikit.process.failure import raise_failure
from optikit.stage import EMITTED, RETURNED, VERIFIED, Emitting, Stage
from optikit.store.lease import Lease, LeaseLostError
from optikit.store.remote import ReadThrough
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
    returned: Mapping[str, Path] = field(default_factory=dict)
    """Results that came back from other machines, by the method of the step that emitted the folder."""
    ranks: int = 1
    """Processes that share the calibration of a prune or quantize step; each gets its part of the threads."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What a run left: artifacts by step key, and by step name whether it was executed or cached."""

    artifacts: Mapping[str, Artifact]
    statuses: Mapping[str, Status]


class Signals:
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
    statuses: dict[str, Status] = {}
    steps = until(plan.order, settings.until)
    progress.plan([step.name for step in steps])
    with Signals():
        for step in steps:
            progress.start(step.name)
            try:
                artifact, status = executor.bring(step)
            except OptikitError:
                progress.finish(step.name, "failed", 0.0, 0.0)
                raise
            executor.artifacts[step.key], statuses[step.name] = artifact, status
            progress.finish(step.name, status, artifact.manifest.seconds, artifact.manifest.peak_memory_mib)
            finished(step, executor.artifacts)
    return Execution(artifacts=executor.artifacts, statuses=statuses)


def until(steps: tuple[Step, ...], name: str | None) -> tuple[Step, ...]:
    """Return steps up to the one of a name; all of them for None."""
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
    reread: list[str] = field(default_factory=list)
    """Digest of the model that the recipe names, once all of it was read again."""

    @cached_property
    def elsewhere(self) -> ReadThrough:
        """The second store, that a step is fetched from where this one hasn't got it."""
        return ReadThrough(self.store, self.progress.note)

    def bring(self, step: Step, emitted: Path | None = None) -> tuple[Artifact, Status]:
        """Return what a step made, now or before; of what was emitted, what became of it where its tools are.

        One process at a time makes it: whoever waits for the lock finds it done.
        """
        stage = stages.load(step.verb, step.method, step.backend)
        finished = replace(step, key=cache_key(finishes=step.key))
        may_finish = isinstance(stage, Emitting) and emitted is None
        if may_finish and (found := self.store.find(finished.key)):
            return found, "verified" if VERIFIED in found.manifest.facts else "cached"
        status: Status = "cached"
        artifact = self.store.find(step.key)
        while artifact is None:
            with (
                suppress(LeaseLostError),  # it was held up: whoever took over goes on with it
                self.store.lock(step.key, timeout=self.settings.lock_timeout, waiting=self.progress.note) as lease,
            ):
                artifact = self.store.find(step.key) or self.elsewhere.find(step.key)
                if artifact is None:
                    artifact, status = self._perform(step, emitted, lease), "executed"
                    self.elsewhere.keep(artifact)
        if VERIFIED in artifact.manifest.facts:
            return artifact, "verified"
        if not artifact.manifest.facts.get(EMITTED):
            return artifact, status
        if may_finish and self._can_finish(step, stage):
            return self.bring(finished, emitted=artifact.path)
        return artifact, "emitted"

    def _can_finish(self, step: Step, stage: Stage) -> bool:
        """Return whether what a step emitted is finished: by a result that came back, or here; else say why not."""
        if step.method in self.settings.returned:
            return True
        why = stage.absent(step.options) if self.settings.resume and isinstance(stage, Emitting) else ""
        if why:
            self.progress.note(f"{step.name} stays emitted: {why}")
        return self.settings.resume and not why

    def _perform(self, step: Step, emitted: Path | None, lease: Lease) -> Artifact:
        """Do a step in a process of its own and keep its result; with `emitted`, finish that folder.

        Raises:
            LeaseLostError: This process was held up for so long that another may do it now.
        """
        self._require_intact(step)
        directory = self.store.job_dir(step.key)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        dest = self.store.staging(step.key)
        request = self._request(step, emitted)
        places = {"dest": str(dest), "scratch": str(self.store.scratch(step.key))}
        write_json(directory / "request.json", request | places)
        observe = partial(self.progress.update, step.name)
        try:
            with self._environment(step, observe) as environment:
                response = supervise.respond(
                    step.name,
                    directory,
                    timeout=self.plan.recipe.timeout,
                    between=lease.require,
                    observe=observe,
                    note=self.progress.note,
                    environment=environment,
                )
            if not response["ok"]:
                raise_failure(response, step=step.name, log=directory / "log.txt")
            if step.backend != stages.OURS and step.writes == "model":
                source = Path(request["source"])
                response["facts"] |= check_backend.require(step.name, step.backend, source, dest, step.after)
            lease.require()
            artifact = self.store.commit(step.key, dest, _manifest(step, request, response))
        finally:
            shutil.rmtree(dest, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)
        return artifact

    def _require_intact(self, step: Step) -> None:
        """Read again, every byte, what a step is about to be made of; what the disk damaged is made again first."""
        for key in sorted({step.source, *step.inputs.values()}):
            if key:
                self._intact(key)
            elif not self.reread:
                require_unchanged(self.plan.model, self.store)
                self.reread.append(self.plan.model.digest)

    def _intact(self, key: str) -> None:
        try:
            self.store.require_intact(self.artifacts[key])
        except IntegrityError:
            made = next(each for each in self.plan.order if each.key == key)
            self.artifacts[key], _ = self.bring(made)

    def _environment(
        self, step: Step, observe: Callable[[int, int, str], None]
    ) -> AbstractContextManager[environments.Environment | None]:
        """Return the interpreter that a step asks for; None is this one."""
        if step.environment is None:
            return nullcontext()
        offline, note = self.settings.offline, self.progress.note
        return environments.use(step.environment, self.store, offline=offline, note=note, progress=observe)

    def _device(self, step: Step) -> str:
        """Return where a step computes: on the CPU where its environment can't do otherwise."""
        return self.plan.device if step.environment is None else environments.find(step.environment).device

    def _path(self, key: str) -> str:
        """Return where an artifact lies; "" is the model that the recipe names."""
        return str(self.artifacts[key].path if key else self.plan.model.path)

    def _finished_by(self, step: Step, emitted: Path | None) -> dict[str, str]:
        """Return the folder that a step emitted, and the result of it that came back, as inputs."""
        if emitted is None:
            return {}
        result = self.settings.returned.get(step.method)
        return {EMITTED: str(emitted)} | ({RETURNED: str(result)} if result else {})

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
            "inputs": inputs | self._finished_by(step, emitted),
            "finish": emitted is not None,
            "calibration": step.calibration,
            "seed": self.plan.recipe.seed,
            "device": self._device(step),
            "threads": max(1, self.settings.threads // ranks),
            "ranks": ranks,
            "max_memory_bytes": self.plan.max_memory_bytes,
            "target": asdict(self.plan.target) if uses_target else None,
        }


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
