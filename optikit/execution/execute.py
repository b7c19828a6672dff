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

from optikit import environments, fileio, host, stages
from optikit.errors import InterruptError, OptikitError, StageFailedError, TerminatedError
from optikit.execution import check_backend, supervise
from optikit.process import failure
from optikit.stage import Emitting
from optikit.store.store import Artifact, Manifest, Store, cache_key

if TYPE_CHECKING:
    from optikit.plan import Plan, Step
    from optikit.progress import Progress, Status

WRITES_MODEL = ("prune", "finetune", "quantize")
"""Verbs whose result is a model directory."""


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
    artifacts: dict[str, Artifact] = {}
    statuses: dict[str, Status] = {}
    steps = _until(plan.order, settings.until)
    progress.plan([step.name for step in steps])
    with _Signals():
        for step in steps:
            progress.start(step.name)
            try:
                artifact, status = _one(step, plan, artifacts, store, progress, settings)
            except OptikitError:
                progress.finish(step.name, "failed", 0.0, 0.0)
                raise
            artifacts[step.key], statuses[step.name] = artifact, status
            manifest = artifact.manifest
            progress.finish(step.name, status, manifest.seconds, manifest.peak_memory_mib)
            finished(step, artifacts)
    return Execution(artifacts=artifacts, statuses=statuses)


def _until(steps: tuple[Step, ...], name: str | None) -> tuple[Step, ...]:
    if name is None:
        return steps
    return steps[: [step.name for step in steps].index(name) + 1]


def _one(
    step: Step,
    plan: Plan,
    artifacts: Mapping[str, Artifact],
    store: Store,
    progress: Progress,
    settings: Settings,
) -> tuple[Artifact, Status]:
    """Return what a step made, now or before; of what was emitted, what became of it where its tools are."""
    perform = partial(_perform, plan=plan, artifacts=artifacts, store=store, progress=progress, settings=settings)
    stage = stages.load(step.verb, step.method, step.backend)
    finished = replace(step, key=cache_key(finishes=step.key))
    if not isinstance(stage, Emitting):
        return _kept(step, lambda: perform(step), store, progress, settings)
    found = store.find(finished.key)
    if found is not None:
        return found, "cached"
    artifact, status = _kept(step, lambda: perform(step), store, progress, settings)
    if status != "emitted" or not settings.resume:
        return artifact, status
    why = stage.absent(step.options)
    if why:
        progress.note(f"{step.name} stays emitted: {why}")
        return artifact, status
    return _kept(finished, lambda: perform(finished, emitted=artifact.path), store, progress, settings)


def _kept(
    step: Step, perform: Callable[[], Artifact], store: Store, progress: Progress, settings: Settings
) -> tuple[Artifact, Status]:
    """Return what is in the store, or what one process at a time makes."""
    found = store.find(step.key)
    if found is not None:
        return found, _status(found, "cached")
    with store.lock(step.key, timeout=settings.lock_timeout, waiting=progress.note):
        found = store.find(step.key)  # whoever held the lock may have done the work
        if found is not None:
            return found, _status(found, "cached")
        artifact = perform()
        return artifact, _status(artifact, "executed")


def _status(artifact: Artifact, done: Status) -> Status:
    """Say `emitted` of files whose work is left to another machine, whether written now or before."""
    return "emitted" if artifact.manifest.facts.get("emitted") else done


def _perform(
    step: Step,
    *,
    plan: Plan,
    artifacts: Mapping[str, Artifact],
    store: Store,
    progress: Progress,
    settings: Settings,
    emitted: Path | None = None,
) -> Artifact:
    """Do a step in a process of its own and keep its result; with `emitted`, finish what that folder was left for."""
    directory = store.job_dir(step.key)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    dest = store.staging(step.key)
    request = _request(step, plan, artifacts, settings)
    request |= {"dest": str(dest), "scratch": str(store.scratch(step.key))}
    if emitted is not None:
        request |= {"finish": True, "inputs": {**request["inputs"], "emitted": str(emitted)}}
    fileio.write_json(directory / "request.json", request)
    try:
        response = _response(directory, step, plan.recipe.timeout, store, progress, settings)
        if not response["ok"]:
            failure.raise_failure(response, step=step.name, log=directory / "log.txt")
        if step.backend != stages.OURS and step.verb in WRITES_MODEL:
            check_backend.require(step.name, step.backend, dest, step.after)
        artifact = store.commit(step.key, dest, _manifest(step, request, response))
    finally:
        shutil.rmtree(dest, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    return artifact


def _response(
    directory: Path, step: Step, timeout: float | None, store: Store, progress: Progress, settings: Settings
) -> dict[str, Any]:
    """Do a step in the interpreter that it asks for, and return what its process answered."""
    observe = partial(progress.update, step.name)
    if step.environment is None:
        return supervise.respond(step.name, directory, timeout=timeout, observe=observe)
    using = environments.use(step.environment, store, offline=settings.offline, note=progress.note, progress=observe)
    with using as environment:
        try:
            response = supervise.respond(
                step.name, directory, timeout=timeout, observe=observe, environment=environment
            )
        except StageFailedError:
            environment.require(step.name)
            raise
        if not response["ok"]:
            environment.require(step.name)
        return response


def source_path(step: Step, plan: Plan, artifacts: Mapping[str, Artifact]) -> Path:
    """Return the model directory (or gguf file) that a step reads."""
    return artifacts[step.source].path if step.source else plan.model.path


def _request(step: Step, plan: Plan, artifacts: Mapping[str, Artifact], settings: Settings) -> dict[str, Any]:
    inputs = {role: str(artifacts[key].path if key else plan.model.path) for role, key in step.inputs.items()}
    return {
        "verb": step.verb,
        "method": step.method,
        "backend": step.backend,
        "options": step.options.model_dump(mode="json"),
        "source": str(source_path(step, plan, artifacts)),
        "inputs": inputs | dict(step.files),
        "calibration": step.calibration,
        "seed": plan.recipe.seed,
        "device": plan.device,
        "threads": max(1, settings.threads // _ranks(step, settings)),
        "ranks": _ranks(step, settings),
        "max_memory_bytes": plan.max_memory_bytes,
        "target": asdict(plan.target),
    }


def _ranks(step: Step, settings: Settings) -> int:
    """Return how many processes do a step: one, unless it walks blocks with calibration text."""
    shared = step.calibration is not None and step.verb in ("prune", "quantize") and step.environment is None
    return settings.ranks if shared else 1


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
