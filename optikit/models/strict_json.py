"""JSON as a machine wrote it: UTF-8, one object, no key twice, of bounded size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from optikit.errors import IntegrityError

FIX = "the file is damaged or made to do harm: get it again from a source that you trust"


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        ValueError: If it is anything else, nested too deeply, or has a key twice: readers differ on which one counts.
    """
    try:
        loaded = json.loads(content.decode(), object_pairs_hook=_unique)
    except RecursionError:
        msg = "nested too deeply"
        raise ValueError(msg) from None
    if not isinstance(loaded, dict):
        msg = "not a JSON object"
        raise ValueError(msg)  # noqa: TRY004  a wrong value, read from a file
    return loaded


def read_text(path: Path, *, most_bytes: int = 2**26) -> bytes:
    """Read a regular file of bounded size, without waiting where it is a pipe.

    Raises:
        IntegrityError: It is something else than a regular file, or larger than `most_bytes`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{path} is not a regular file", fix=FIX)
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size > most_bytes:
            raise IntegrityError(f"{path} has {found.st_size} bytes, more than {most_bytes}", fix=FIX)
        return file.read()


def read_object(path: Path, *, most_bytes: int = 2**26) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        IntegrityError: If it doesn't, or `read_text` refuses it.
    """
    content = read_text(path, most_bytes=most_bytes)
    try:
        return parse_object(content)
    except ValueError as error:
        raise IntegrityError(f"{path}: {error}", fix=FIX) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            msg = f"key {key!r} is there twice"
            raise ValueError(msg)
        found[key] = value
    return found
