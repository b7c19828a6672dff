"""The sha256 of a file: one way to say which bytes these are, and files that are kept with theirs for a resume."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """Return the sha256 of a regular file, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, links followed, that is a regular one.

    Raises:
        OSError: It can't be read, or is a pipe or a device: those may have no end, and no beginning either.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_regular(path: Path, most_bytes: int = -1) -> bytes:
    """Return the bytes of a regular file, or its first `most_bytes`; errors as of `open_regular`."""
    with open_regular(path) as file:
        return file.read(most_bytes)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    partial.replace(path)


SUM = ".sha256"
"""Ends the name of the file that holds the sum of another."""


def keep_checked(partial: Path, path: Path) -> None:
    """Put a finished file in its place, to be read by a later process, with its sum beside it.

    The sum of the file that it replaces is kept as well: killed between the two renames, one of them is right.
    """
    side = path.with_name(path.name + SUM)
    for stray in (path, side):
        if stray.is_dir():
            shutil.rmtree(stray)
    before = side.read_bytes().split()[:1] if side.is_file() else []
    new = side.with_name(side.name + ".part")
    new.write_bytes(b"\n".join([file_sha256(partial).encode(), *before]))
    new.replace(side)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def is_intact(path: Path, note: Callable[[str], None] = lambda _: None) -> bool:
    """Return whether a file is there as `keep_checked` left it; one that is damaged is told to `note`."""
    if not os.path.lexists(path):
        return False
    side = path.with_name(path.name + SUM)
    if path.is_file() and side.is_file() and file_sha256(path).encode() in side.read_bytes().split():
        return True
    note(f"{path.name}, kept of an earlier run of this step, is damaged: what it held is made again")
    return False
