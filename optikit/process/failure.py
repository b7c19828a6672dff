"""DOCSTRING optikit.process.failure."""

from __future__ import annotations

import errno
import resource
import traceback
from pathlib import Path
from typing import Any

from optikit.errors import BY_CODE, Exit, OptikitError

OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "std::bad_alloc",
    "failed to allocate",
    "failed to map segment from shared object",  # no room to load a library
    "can't start new thread",  # no room for its stack
)


LIMIT_NEARLY_REACHED = 0.8
"""Share of the address space that a process has had when whatever fails in it fails for want of memory."""


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


def raise_failure(response: dict[str, Any], *, step: str, log: Path) -> None:
    """Raise the error that a response describes, on the runner's side of the border."""
    error = BY_CODE.get(response["code"], OptikitError)
    raise error(f"{step}: {response['message']}", fix=response["fix"] or f"the log has more: {log}")
