"""JSON as a machine wrote it: UTF-8, one object, no key twice, of bounded size."""

from __future__ import annotations

import json
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


def read_object(path: Path, *, most_bytes: int = 2**26) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        IntegrityError: If it doesn't, or is larger than `most_bytes`.
    """
    size = path.stat().st_size
    if size > most_bytes:
        raise IntegrityError(f"{path} has {size} bytes, more than {most_bytes}", fix=FIX)
    try:
        return parse_object(path.read_bytes())
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
