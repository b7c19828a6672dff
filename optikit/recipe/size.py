"""Sizes as people write them: `2GiB`, `500MB`, `1073741824`."""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes that a text means.

    Raises:
        ValueError: If it isn't a number with a unit.

    >>> parse_size("2GiB"), parse_size("1.5 MB")
    (2147483648, 1500000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        msg = f"{text!r} is not a size; write for example 2GiB or 500MB"
        raise ValueError(msg)
    return int(float(match[1]) * UNITS[match[2].upper()])
