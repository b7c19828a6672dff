"""The child process that does one step: `python -m optikit.execution.worker JOB`.

Only files cross the border, so the same contract serves the main interpreter and any managed environment:

    JOB/request.json    written by the runner: stage, options, source, dest, inputs, seed, …
    JOB/events.jsonl    appended here while the stage runs: {"done": 3, "total": 30, "what": "block"}, {"note": "…"}
    JOB/response.json   written here last: {"ok": true, "facts": …} or {"ok": false, "code": 70, "message": …, "fix": …}
    JOB/log.txt         stdout and stderr

A failed job directory is the bug report. No response means that the process died, or that there was no room on disk
for one: then the exit code says so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from optikit.errors import UnavailableError
from optikit.fileio import write_json
from optikit.host import versions
from optikit.process import failure, launch, memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from optikit.stage import Calibration, Facts, Job, Stage, StageOptions
    from optikit.targets import Target

SECONDS_BETWEEN_EVENTS = 0.1
CUSHION_BYTES = 32 * 2**20
"""Address space kept free (never touched, so no memory) for saying that there is no more."""


def rank() -> int:
    """Return which of a step's processes this is: 0 unless torchrun started several (`optikit run --ranks`)."""
    return int(os.environ.get("RANK", "0"))


def _device(wanted: str) -> str:
    """Return the torch device of this process: each of several has a GPU of its own."""
    if wanted != "cuda":
        return wanted
    import torch

    if not torch.cuda.is_available():
        message = f"torch {torch.__version__} finds no GPU that it can use"
        raise UnavailableError(message, fix="use --device cpu; `optikit doctor` says what is here")
    own = os.environ.get("LOCAL_RANK")
    if own is None:
        return wanted
    torch.cuda.set_device(int(own))  # or sums over processes would begin on the first GPU
    return f"cuda:{own}"


def _reporter(path: Path) -> Callable[[int, int, str], None]:
    last = 0.0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_EVENTS and done != total:
            return
        last = now
        with path.open("a", encoding="utf-8") as events:
            events.write(json.dumps({"done": done, "total": total, "what": what}) + "\n")

    return progress


def _noter(path: Path) -> Callable[[str], None]:
    def note(what: str) -> None:
        with path.open("a", encoding="utf-8") as events:
            events.write(json.dumps({"note": what}) + "\n")

    return note


def _target(fields: dict[str, Any] | None) -> Target | None:
    """Return the target that a request describes; JSON has no tuples."""
    from optikit.targets import Target

    if fields is None:
        return None
    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Target(**values)


def _calibration(fields: dict[str, Any] | None) -> Calibration | None:
    """Return the calibration text that a request describes."""
    from optikit.stage import Calibration

    return Calibration(**{**fields, "text": Path(fields["text"])}) if fields else None


class _Work(NamedTuple):
    """A stage, what it is asked for, and whether it runs or finishes what was emitted."""

    stage: Stage
    options: StageOptions
    job: Job
    do: Callable[[Any, Job], Facts]


def _work(directory: Path) -> _Work:
    """Return what a job directory asks for; the stage gets what it declared, and nothing else."""
    from optikit import stages
    from optikit.execution import returned
    from optikit.stage import EMITTED, RETURNED, Emitting, Inputs, Job

    request = json.loads((directory / "request.json").read_text(encoding="utf-8"))
    stage = stages.load(request["verb"], request["method"], request.get("backend", stages.OURS))
    options = stage.Options.model_validate(request["options"])
    finish: Callable[[Any, Job], Facts] | None = None
    if RETURNED in request["inputs"]:
        finish = returned.read
    elif request.get("finish") and isinstance(stage, Emitting):
        finish = stage.finish
    declared = {*stage.inputs(options), *((EMITTED, RETURNED) if finish else ())}
    dest, scratch = Path(request["dest"]), Path(request["scratch"])
    if rank():  # writes the same as the first process, for nobody
        scratch = scratch / f"rank-{rank()}"
        dest = scratch / "dest"
        shutil.rmtree(dest, ignore_errors=True)
        dest.mkdir(parents=True)
    events = directory / "events.jsonl"
    heard: dict[str, Any] = {} if rank() else {"progress": _reporter(events), "note": _noter(events)}
    job = Job(
        source=Path(request["source"]),
        dest=dest,
        scratch=scratch,
        inputs=Inputs({role: Path(path) for role, path in request["inputs"].items()}, declared),
        calibration=_calibration(request["calibration"]) if "calibration" in declared else None,
        seed=request["seed"],
        device=_device(request["device"]),
        threads=request["threads"],
        max_memory_bytes=request["max_memory_bytes"],
        target=_target(request.get("target")) if stage.USES_TARGET else None,
        **heard,
    )
    return _Work(stage, options, job, finish or stage.run)


def main(directory: Path) -> int:
    """Do the work of a job directory, write the response, and return the exit code."""
    launch.end_with_launched()
    cushion = bytearray(CUSHION_BYTES)
    try:
        work, started = _work(directory), time.monotonic()
        facts = work.do(work.options, work.job)
        facts = {**facts, **_require_whole(work, facts)}
        response = _answer(work.stage, facts, time.monotonic() - started)
    except BaseException as error:  # noqa: BLE001 - whatever goes wrong here has to cross the process border
        del cushion
        response = _failed(error)
    if not rank():
        try:
            write_json(directory / "response.json", response)
        except OSError as error:
            response = _failed(error)
    return 0 if response["ok"] else int(response["code"])


def _require_whole(work: _Work, facts: Facts) -> Facts:
    """Refuse a model directory that transformers can't load or that lost a tensor, before it counts as a result.

    What a library of its own environment left is looked at by `check_backend`.

    Returns:
        What became of the source's tensors, where there is a source.
    """
    from optikit.stage import MAIN, Changing

    stage, job = work.stage, work.job
    if stage.WRITES not in ("source", "model") or stage.ENVIRONMENT != MAIN or rank():
        return {}
    from optikit.formats import census, loadable

    found: Facts = {}
    if stage.WRITES == "model":
        changes = stage.CHANGES if isinstance(stage, Changing) else "all"
        found = {"tensors": census.take(job.source, job.dest, changes, facts).facts()}
    loadable.require(job.dest)
    return found


def _answer(stage: Stage, facts: Facts, seconds: float) -> dict[str, Any]:
    from optikit.stage import SERVERS_PEAK

    return {
        "ok": True,
        "facts": facts,
        "seconds": seconds,
        "peak_memory_mib": max(memory.peak_with_children_mib(), facts.get(SERVERS_PEAK, 0.0)),
        "versions": versions(stage.LIBRARIES),
    }


def _failed(error: BaseException) -> dict[str, Any]:
    response = failure.as_failure(error)
    with suppress(OSError):  # no room in the log either
        sys.stderr.write(response["traceback"])
        sys.stderr.flush()
    return response


if __name__ == "__main__":
    sys.exit(main(Path(os.fsdecode(sys.argv[1]))))
