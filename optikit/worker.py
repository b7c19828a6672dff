"""The child process that does one step: `python -m optikit.worker JOB`.

Only files cross the border, so the same contract serves the main interpreter and any managed environment:

    JOB/request.json    written by the runner: stage, options, source, dest, inputs, seed, …
    JOB/events.jsonl    appended here while the stage runs: {"done": 3, "total": 30, "what": "block"}
    JOB/response.json   written here last: {"ok": true, "facts": …} or {"ok": false, "code": 70, "message": …, "fix": …}
    JOB/log.txt         stdout and stderr

A failed job directory is the bug report. No response means that the process died; the runner names the signal.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import resource
import shutil
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import BY_CODE, Exit, OptikitError

if TYPE_CHECKING:
    from collections.abc import Callable

    from optikit.targets import Target

SECONDS_BETWEEN_EVENTS = 0.1
OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "std::bad_alloc",
    "failed to allocate",
    "failed to map segment from shared object",  # no room to load a library
    "can't start new thread",  # no room for its stack
)
SERVERS_PEAK = "servers_peak_memory_mib"
"""Fact of a stage that started servers: the memory of all of them, which the kernel doesn't count as its children's."""
LIMIT_NEARLY_REACHED = 0.8
"""Share of the address space that a process has had when whatever fails in it fails for want of memory."""
CUSHION_BYTES = 32 * 2**20
"""Address space kept free (never touched, so no memory) for saying that there is no more."""


def rank() -> int:
    """Return which of a step's processes this is: 0 unless torchrun started several (`optikit run --ranks`)."""
    return int(os.environ.get("RANK", "0"))


def _device(wanted: str) -> str:
    """Return the torch device of this process: each of several has a GPU of its own."""
    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if wanted == "cuda" and own else wanted


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that a killed run leaves nothing behind (Linux)."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def peak_memory_mib() -> float:
    """Return the largest resident set so far of this process or of any child it waited for, MiB."""
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage) / (1024 if sys.platform == "linux" else 1024**2)


def address_space_used_up() -> bool:
    """Return whether this process has come near its own limit of address space (Linux; elsewhere False).

    A library that can't be loaded for want of memory says so in many ways, or not at all.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/status")
    if limit == resource.RLIM_INFINITY or not status.exists():
        return False
    peak = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmPeak:"))
    return int(peak.split()[1]) * 1024 > LIMIT_NEARLY_REACHED * limit


def _is_out_of_memory(error: BaseException) -> bool:
    said = any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)
    return isinstance(error, MemoryError) or said or address_space_used_up()


def versions(libraries: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions of distributions; those that aren't installed are left out."""
    return {name: found for name in libraries if (found := _version(name))}


@functools.cache
def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    partial.replace(path)


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


def as_failure(error: BaseException) -> dict[str, Any]:
    """Return the response for an exception: errors of ours keep their code, system errors get the one they mean."""
    code, message, fix = Exit.STAGE_FAILED, f"{type(error).__name__}: {error}", ""
    if isinstance(error, OptikitError):
        code, message, fix = error.code, error.message, error.fix
    elif _is_out_of_memory(error):
        code, fix = Exit.OUT_OF_MEMORY, "give the run more memory, or fewer calibration samples"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
        code, fix = Exit.IO, "free some disk space (`optikit cache gc`) and run again"
    trace = "".join(traceback.format_exception(error))
    return {"ok": False, "code": int(code), "message": message, "fix": fix, "traceback": trace}


def _target(fields: dict[str, Any] | None) -> Target | None:
    """Return the target that a request describes; JSON has no tuples."""
    from optikit.targets import Target

    if fields is None:
        return None
    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Target(**values)


def perform(directory: Path) -> dict[str, Any]:
    """Do the work of a job directory and return the response.

    Raises:
        Exception: Whatever the stage raises; `main` turns it into a response.
    """
    from optikit import stages
    from optikit.stages.protocol import Calibration, Emitting, Job

    request = json.loads((directory / "request.json").read_text(encoding="utf-8"))
    stage = stages.load(request["verb"], request["method"], request.get("backend", stages.OURS))
    options = stage.Options.model_validate(request["options"])
    calibration = request["calibration"]
    dest, scratch = Path(request["dest"]), Path(request["scratch"])
    if rank():  # writes the same as the first process, for nobody
        scratch = scratch / f"rank-{rank()}"
        dest = scratch / "dest"
        shutil.rmtree(dest, ignore_errors=True)
        dest.mkdir(parents=True)
    job = Job(
        source=Path(request["source"]),
        dest=dest,
        scratch=scratch,
        inputs={role: Path(path) for role, path in request["inputs"].items()},
        calibration=calibration and Calibration(**{**calibration, "text": Path(calibration["text"])}),
        seed=request["seed"],
        device=_device(request["device"]),
        threads=request["threads"],
        max_memory_bytes=request["max_memory_bytes"],
        target=_target(request.get("target")),
        **({} if rank() else {"progress": _reporter(directory / "events.jsonl")}),
    )
    started = time.monotonic()
    do = stage.finish if request.get("finish") and isinstance(stage, Emitting) else stage.run
    facts = do(options, job)
    return {
        "ok": True,
        "facts": facts,
        "seconds": time.monotonic() - started,
        "peak_memory_mib": max(peak_memory_mib(), facts.get(SERVERS_PEAK, 0.0)),
        "versions": versions(stage.LIBRARIES),
    }


def main(directory: Path) -> int:
    """Perform one job, write its response, and return the exit code."""
    die_with_parent()
    cushion = bytearray(CUSHION_BYTES)
    try:
        response = perform(directory)
    except BaseException as error:  # noqa: BLE001 - whatever goes wrong here has to cross the process border
        del cushion
        response = as_failure(error)
        sys.stderr.write(response["traceback"])
    if not rank():
        write_json(directory / "response.json", response)
    return 0 if response["ok"] else int(response["code"])


def raise_failure(response: dict[str, Any], *, step: str, log: Path) -> None:
    """Raise the error that a response describes, on the runner's side of the border."""
    error = BY_CODE.get(response["code"], OptikitError)
    raise error(f"{step}: {response['message']}", fix=response["fix"] or f"the log has more: {log}")


if __name__ == "__main__":
    sys.exit(main(Path(os.fsdecode(sys.argv[1]))))
