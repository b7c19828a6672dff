"""What a failed build says, as an error with a name."""

from __future__ import annotations

import re
from pathlib import Path

from optikit.errors import DiskError, IntegrityError, OptikitError, StageFailedError, UnavailableError

_PASSWORD = re.compile(r"(?<=//)[^/@\s]+@")

_KINDS: tuple[tuple[type[OptikitError], tuple[str, ...], str, str], ...] = (
    (
        IntegrityError,
        ("do not match the hashes", "hash mismatch"),
        "the index delivered something else than its lock says",
        "clear the installer's cache and build again; if it stays, ask who runs the index",
    ),
    (
        DiskError,
        ("no space left on device", "disk quota exceeded"),
        "the disk is full",
        "free some space (`optikit cache gc`, `optikit env gc`) and build again",
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


def failure(name: str, said: str, log: Path) -> OptikitError:
    """Return the error for what an installer said before it failed.

    Args:
        name: The environment.
        said: Its output; passwords in addresses are left out of the message.
        log: Where all of it is.
    """
    lowered = said.lower()
    for error, marks, what, fix in _KINDS:
        if any(mark in lowered for mark in marks):
            return error(f"environment {name}: {what} ({_telling(said, marks)})", fix=f"{fix}; the log: {log}")
    last = _PASSWORD.sub("", (said.strip().splitlines() or ["no word"])[-1].strip())
    fix = f"see whether the package index can be reached, and build again; the log: {log}"
    return UnavailableError(f"environment {name} can't be built: {last[:300]}", fix=fix)


def _telling(said: str, marks: tuple[str, ...]) -> str:
    """Return the line that gave it away, with the next two: uv names the package only there."""
    lines = said.splitlines()
    place = next(index for index, line in enumerate(lines) if any(mark in line.lower() for mark in marks))
    told = " ".join(line.strip() for line in lines[place : place + 3] if line.strip())
    return _PASSWORD.sub("", told)[:300]
