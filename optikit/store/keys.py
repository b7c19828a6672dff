"""Cache keys: the sha256 of everything that decides a result, written one way only."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

_KEY = re.compile(r"[0-9a-f]{64}")


def is_key(text: str) -> bool:
    """Say whether a text can be a key: 64 lower-case hex digits, nothing that leaves a directory."""
    return _KEY.fullmatch(text) is not None


def valid(key: str) -> str:
    """Return a key, or refuse what isn't one before it becomes part of a path.

    Raises:
        ValueError: If it isn't 64 lower-case hex digits.
    """
    if not is_key(key):
        msg = f"{key!r} is not a key: 64 hex digits"
        raise ValueError(msg)
    return key


def canonical(value: Any) -> Any:
    """Return a value as JSON has it, with one form for each meaning; whatever has none is refused.

    Raises:
        TypeError: If there is no such form: an object, a mapping with keys that aren't text.
        ValueError: If a number is infinite or not a number.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            msg = f"{value} can't be part of a cache key"
            raise ValueError(msg)
        return value
    if isinstance(value, Mapping):
        return _canonical_mapping(value)
    if isinstance(value, set | frozenset):
        return sorted(canonical(item) for item in value)
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    msg = f"{type(value).__name__} can't be part of a cache key: {value!r}"
    raise TypeError(msg)


def _canonical_mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    if not all(isinstance(name, str) for name in value):
        msg = f"a mapping with keys that aren't text can't be part of a cache key: {value!r}"
        raise TypeError(msg)
    return {name: canonical(item) for name, item in value.items()}


def cache_key(**parts: Any) -> str:
    """Return the sha256, in hex, of the canonical JSON of all parts: the order of names doesn't matter.

    >>> cache_key(a=1, b=(2, 3)) == cache_key(b=[2, 3], a=1) != cache_key(a=1.0, b=[2, 3])
    True
    """
    text = json.dumps(canonical(parts), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
