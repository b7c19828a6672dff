"""Plan → artifacts: for every step, cache or child process or error, in one loop.

A step runs in a process of its own (own session, dies with its parent), so that running out of memory, crashing
natively and hanging have names and exit codes, and the memory of one step is free again before the next begins.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from optikit import environments, host, stages, worker
from optikit.backends import promise
from optikit.errors import (
    InterruptError,
    OptikitError,
    OutOfMemoryError,
    StageFailedError,
    StageTimeoutError,
    TerminatedError,
)
from optikit.store.store import Artifact, Manifest, Store, cache_key

if TYPE_CHECKING:
    from optikit.plan import Plan, Step
    from optikit.terminal import Progress, Status

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""How long an interrupted step may take to end by itself before it is killed."""
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_")
"""What torchrun tells its processes: a step that we start is none of them, or gets its own."""
WRITES_MODEL = ("prune", "finetune", "quantize")
"""Verbs whose result is a model directory."""
MOST_LOG_BYTES = 64 * 2**20
"""Beyond this a log is begun anew: a library that prints in a loop must not fill the disk."""
LOG_TAIL_BYTES = 4096
"""How much of a dead process's log is searched for a cause."""


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
    if hasattr(stage, "finish"):
        found = store.find(finished.key)
        if found is not None:
            return found, "cached"
    artifact, status = _kept(step, lambda: perform(step), store, progress, settings)
    if status != "emitted" or not settings.resume:
        return artifact, status
    why = stage.absent(step.options)  # type: ignore[attr-defined]  # stages that emit have it
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
    worker.write_json(directory / "request.json", request)
    try:
        response = _response(directory, step, plan.recipe.timeout, store, progress, settings)
        if not response["ok"]:
            worker.raise_failure(response, step=step.name, log=directory / "log.txt")
        if step.backend != stages.OURS and step.verb in WRITES_MODEL:
            promise.require(step.name, step.backend, dest, step.after)
        artifact = store.commit(step.key, dest, _manifest(step, request, response))
    finally:
        shutil.rmtree(dest, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    return artifact


def _response(
    directory: Path, step: Step, timeout: float | None, store: Store, progress: Progress, settings: Settings
) -> dict[str, Any]:
    """Do a step in the interpreter that it asks for, and return what its process answered."""
    if step.environment is None:
        return _child(directory, step, timeout, progress, None)

    def built(done: int, total: int, what: str) -> None:
        progress.update(step.name, done, total, what)

    using = environments.use(step.environment, store, offline=settings.offline, note=progress.note, progress=built)
    with using as environment:
        try:
            response = _child(directory, step, timeout, progress, environment)
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


def _environment(threads: int) -> dict[str, str]:
    """Return the child's environment: no hub access, no secrets, a fixed number of threads."""
    secret = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "AWS_", "_KEY")
    kept = {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in secret)}
    kept = {name: value for name, value in kept.items() if not name.startswith(("TORCHELASTIC_", *TORCHRUN))}
    count = str(threads)
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "PYTHONHASHSEED": "0",
    }


@contextmanager
def _spawned(
    directory: Path, request: Mapping[str, Any], environment: environments.Environment | None
) -> Iterator[subprocess.Popen[bytes]]:
    python, variables = Path(sys.executable), _environment(request["threads"])
    if environment is not None:
        python, variables = environment.python, environment.variables(variables, directory)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request['ranks']}"]
    command = [str(python), *(launcher if request["ranks"] > 1 else []), "-m", "optikit.worker", str(directory)]
    with (directory / "log.txt").open("ab") as log:  # appended to, so that it can be begun anew meanwhile
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child and everything it started: politely, then not."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        if child.poll() is None:
            _signal_group(child.pid, number)
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
    _signal_group(child.pid, signal.SIGKILL)  # grandchildren that outlived it


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _child(
    directory: Path,
    step: Step,
    timeout: float | None,
    progress: Progress,
    environment: environments.Environment | None,
) -> dict[str, Any]:
    request = json.loads((directory / "request.json").read_text(encoding="utf-8"))
    events = _Events(directory / "events.jsonl")
    started = time.monotonic()
    kills = _oom_kills()
    with _spawned(directory, request, environment) as child:
        while child.poll() is None:
            for event in events.new():
                progress.update(step.name, event["done"], event["total"], event["what"])
            _bound(directory / "log.txt")
            if timeout is not None and time.monotonic() - started > timeout:
                fix = "raise `timeout:` in the recipe, or run again: finished blocks are kept"
                raise StageTimeoutError(f"{step.name}: took longer than {timeout:g} s", fix=fix)
            time.sleep(POLL_SECONDS)
    response = directory / "response.json"
    if response.exists():
        loaded: dict[str, Any] = json.loads(response.read_text(encoding="utf-8"))
        return loaded
    raise _death(step.name, child.returncode, directory / "log.txt", oom=_oom_kills() > kills)


def _bound(log: Path) -> None:
    """Begin a log anew that has grown too large."""
    if log.stat().st_size > MOST_LOG_BYTES:
        os.truncate(log, 0)
        with log.open("ab") as file:
            file.write(f"(more than {MOST_LOG_BYTES >> 20} MiB before this were cut off)\n".encode())


class _Events:
    """Reads a JSON Lines file that another process appends to; a half-written last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete = file.read().rpartition(b"\n")[0]
        self._offset += len(complete) + 1 if complete else 0
        return [json.loads(line) for line in complete.splitlines()]


def _oom_kills() -> int:
    """Return how often the kernel killed a process of this control group for memory; 0 where it doesn't tell."""
    path = Path("/sys/fs/cgroup/memory.events")
    if not path.exists():
        return 0
    counts = dict(line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return int(counts.get("oom_kill", 0))


def _death(step: str, returncode: int, log: Path, *, oom: bool) -> OptikitError:
    """Return the error for a child that died without a response."""
    if -returncode == signal.SIGKILL:
        certain = "the kernel ended it for memory" if oom else "something ended it with SIGKILL, most often for memory"
        fix = "fewer or shorter calibration samples, or a machine with more memory"
        return OutOfMemoryError(f"{step}: {certain}", fix=fix)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return StageFailedError(f"{step}: its process crashed with {name}", fix=f"the log has more: {log}")
    tail = b""
    if log.exists():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            tail = file.read()
    if b"MemoryError" in tail:
        fix = "give the run more memory, or fewer calibration samples"
        return OutOfMemoryError(f"{step}: its process had no memory left to say so", fix=fix)
    return StageFailedError(f"{step}: its process ended with exit code {returncode} and no response", fix=f"see {log}")
