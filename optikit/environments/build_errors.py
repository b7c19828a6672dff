"""What a failed build says, as an error with a name."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from optikit.errors import BY_CODE, Exit, IntegrityError, OptikitError, StageFailedError, UnavailableError
from optikit.process.failure import Cause, cause_in

_PASSWORD = re.compile(r"(?<=//)[^/@\s]+@")

_KINDS: tuple[tuple[type[OptikitError], tuple[str, ...], str, str], ...] = (
    (
        IntegrityError,
        ("do not match the hashes", "hash mismatch"),
        "the index delivered something else than its lock says",
        "clear the installer's cache and build again; if it stays, ask who runs the index",
    ),
    (
        UnavailableError,
        (
            "no matching distribution",
            "could not find a version",
            "no solution found",
            "not found in the",
            "unsatisfiable",
        ),
        "a package of its lock isn't to be had",
        "configure an index that has it; CPU builds of torch (+cpu) are on https://download.pytorch.org/whl/cpu",
    ),
    (
        StageFailedError,
        ("failed to build", "failed building wheel", "metadata-generation-failed", "subprocess-exited-with-error"),
        "a package can't be built here",
        "install a C++ compiler and the headers that its message asks for",
    ),
)
"""Error, what gives it away in lower case, what happened, what to do."""
_RAN_OUT: dict[Cause, tuple[str, str]] = {
    Exit.IO: ("the disk is full", "free some space (`optikit cache gc`, `optikit env gc`) and build again"),
    Exit.OUT_OF_MEMORY: ("memory ran out", "give it more memory, or set MAX_JOBS=1 where something is compiled"),
}
"""What happened, what to do."""


def failure(name: str, said: str, log: Path) -> OptikitError:
    """Return the error for what an installer said before it failed.

    Args:
        name: The environment.
        said: Its output; passwords in addresses are left out of the message.
        log: Where all of it is.
    """
    ran_out = cause_in(said)
    if ran_out is not None:
        what, fix = _RAN_OUT[ran_out]
        message = f"environment {name}: {what} ({_telling(said, lambda line: cause_in(line) is not None)})"
        return BY_CODE[ran_out](message, fix=f"{fix}; the log: {log}")
    for error, marks, what, fix in _KINDS:
        if _has(said, marks):
            message = f"environment {name}: {what} ({_telling(said, partial(_has, marks=marks))})"
            return error(message, fix=f"{fix}; the log: {log}")
    last = _PASSWORD.sub("", (said.strip().splitlines() or ["no word"])[-1].strip())
    fix = f"see whether the package index can be reached, and build again; the log: {log}"
    return UnavailableError(f"environment {name} can't be built: {last[:300]}", fix=fix)


def _has(text: str, marks: tuple[str, ...]) -> bool:
    return any(mark in text.lower() for mark in marks)


def _telling(said: str, tells: Callable[[str], bool]) -> str:
    """Return the line that gave it away, with the next two: uv names the package only there."""
    lines = said.splitlines()
    place = next(index for index, line in enumerate(lines) if tells(line))
    told = " ".join(line.strip() for line in lines[place : place + 3] if line.strip())
    return _PASSWORD.sub("", told)[:300]
