"""What went wrong, by name: in this process, on the other side of its border, or in a process that died.

Memory and disk run out in many libraries, each of which says so in its own words, often as the cause of another error.
`cause` and `cause_in` are the one place that knows them.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from optikit.errors import (
    BY_CODE,
    DiskError,
    Exit,
    OptikitError,
    OutOfMemoryError,
    StageFailedError,
    StageTimeoutError,
)

Cause = Literal[Exit.OUT_OF_MEMORY, Exit.IO]
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
FIXES: dict[Cause, str] = {
    Exit.OUT_OF_MEMORY: "give it more memory, a smaller model, or fewer and shorter calibration samples",
    Exit.IO: "free some disk space (`optikit cache gc`) and run again",
}
LACKS: dict[Cause, str] = {Exit.OUT_OF_MEMORY: "ran out of memory", Exit.IO: "had no room on the disk"}
TEXTS: dict[Cause, tuple[str, ...]] = {
    Exit.OUT_OF_MEMORY: (
        "memoryerror",
        "can't allocate memory",
        "cannot allocate memory",
        "out of memory",
        "std::bad_alloc",
        "failed to allocate",
        "failed to map segment from shared object",  # no room to load a library
        "can't start new thread",  # no room for its stack
    ),
    Exit.IO: (
        *(re.escape(os.strerror(number).lower()) for number in DISK_ERRNOS),
        "database or disk is full|disk i/o error",  # sqlite
        r"pytorchstreamwriter failed|unexpected pos \d+ vs \d+",  # torch.save, and what it says when it closes its file
        r"\d+ requested and \d+ written",  # numpy's tofile and save
    ),
}
"""What gives each away, as regular expressions over text in lower case."""
_PATTERNS = {cause: re.compile("|".join(texts)) for cause, texts in TEXTS.items()}
LIMIT_NEARLY_REACHED = 0.8
"""Share of the address space that a process has had when whatever fails in it fails for want of memory."""
TAIL_BYTES = 2**16
"""Bytes at the end of a log in which the cause of a death is looked for; a log may have gigabytes."""
TAIL_LINES, TAIL_ERRORS = 12, 6
"""Last lines of a log that an error message quotes, each up to 500 characters, and of the errors told before them."""
_ERROR_LINE = re.compile(r"^\w[\w.]*Error\b|^\s+Value error")


def cause_in(text: str) -> Cause | None:
    """Return what ran out, by what a library or an installer printed; None if it says nothing of the kind."""
    lowered = text.lower()
    return next((cause for cause, pattern in _PATTERNS.items() if pattern.search(lowered)), None)


def cause(error: BaseException) -> Cause | None:
    """Return what ran out, by an exception, by those that it was raised from, and by those that it holds."""
    return next((found for each in _chain(error) if (found := _own_cause(each)) is not None), None)


def _own_cause(error: BaseException) -> Cause | None:
    if isinstance(error, MemoryError | OutOfMemoryError):
        return Exit.OUT_OF_MEMORY
    if isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in DISK_ERRNOS):
        return Exit.IO
    return cause_in(str(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, outermost first, and everything behind it that wasn't suppressed."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting.append(each.__cause__ or (None if each.__suppress_context__ else each.__context__))
        waiting += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


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


def as_failure(error: BaseException) -> dict[str, Any]:
    """Return the response for an exception: errors of ours keep their code unless what ran out is behind them."""
    code, message, fix = Exit.STAGE_FAILED, f"{type(error).__name__}: {error}", ""
    if isinstance(error, OptikitError):
        code, message, fix = error.code, error.message, error.fix
    if code == Exit.STAGE_FAILED:
        found = cause(error)
        if found is None and not isinstance(error, OptikitError) and address_space_used_up():
            found = Exit.OUT_OF_MEMORY
        code, fix = (found, FIXES[found]) if found is not None else (code, fix)
    trace = "".join(traceback.format_exception(error))
    return {"ok": False, "code": int(code), "message": message, "fix": fix, "traceback": trace}


def ran_out(error: BaseException) -> OptikitError | None:
    """Return the error of ours for an exception behind which memory or disk ran out; None for any other."""
    found = cause(error)
    return BY_CODE[found](f"{type(error).__name__}: {error}", fix=FIXES[found]) if found is not None else None


def raise_failure(response: dict[str, Any], *, step: str, log: Path) -> None:
    """Raise the error that a response describes, on the other side of the border."""
    error = BY_CODE.get(response["code"], OptikitError)
    raise error(f"{step}: {response['message']}", fix=response["fix"] or f"the log has more: {log}")


def death(what: str, code: int, log: Path, *, for_memory: bool = False, fix: str = "") -> OptikitError:
    """Return the error for a process that ended without an answer.

    Args:
        what: It, for the message.
        code: Its exit code, negative for a signal, or above 128 as shells and keepers tell one.
        log: What it printed; the end is quoted.
        for_memory: The kernel has killed a process for memory meanwhile.
        fix: What to do where that is known better here than from how it died.
    """
    told, number = tail(log), _signal(code)
    fix = fix or f"the whole log is {log}"
    if number == signal.SIGKILL:
        how = "the kernel for want of memory" if for_memory else "SIGKILL, most often for memory"
        return OutOfMemoryError(f"{what}: its process was killed by {how}", fix=FIXES[Exit.OUT_OF_MEMORY])
    found = _of_dead(code, number, log)
    how = f"crashed with {number.name}" if number else f"ended with exit code {code}"
    if found is None:
        return StageFailedError(f"{what}: its process {how}; its log ends:\n{told}", fix=fix)
    words = next((line for line in reversed(_telling_lines(log)) if cause_in(line)), "")
    message = f"{what}: its process {how}, as it {LACKS[found]}{words and ': '}{words.strip()}"
    return BY_CODE[found](message, fix=FIXES[found])


def no_answer(what: str, seconds: float, log: Path, *, fix: str) -> StageTimeoutError:
    """Return the error for a process that lives and doesn't answer."""
    return StageTimeoutError(f"{what}: no answer in {seconds:g} s; its log ends:\n{tail(log)}", fix=fix)


def tail(log: Path) -> str:
    """Return the end of a log, as an error message quotes it: its last lines, and errors that it told before them.

    A server's last error is often that another one happened; a program's is the end of its traceback.
    """
    return "\n".join(line[:500] for line in _telling_lines(log)) or "(empty)"


def _signal(code: int) -> signal.Signals | None:
    number = -code if code < 0 else code - 128
    return signal.Signals(number) if number in set(signal.Signals) else None


def _of_dead(code: int, number: signal.Signals | None, log: Path) -> Cause | None:
    """Return what a dead process lacked: by its exit code, by its last lines, by a page that found no room on disk."""
    if number == signal.SIGBUS and shutil.disk_usage(log.parent).free < mmap.PAGESIZE:
        return Exit.IO
    if code == Exit.IO:
        return Exit.IO
    return cause_in("\n".join(_telling_lines(log)))


def _telling_lines(log: Path) -> list[str]:
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    errors = [place for place, line in enumerate(lines) if _ERROR_LINE.search(line)][-TAIL_ERRORS:]
    return [lines[place] for place in sorted({*errors, *range(max(0, len(lines) - TAIL_LINES), len(lines))})]
