"""Plain tables for the terminal: aligned columns, no colour, readable when piped."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first row is its heading.

    >>> table([("name", "size"), ("a", "1"), ("bb", "22")])
    ['name  size', 'a     1', 'bb    22']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def wrapped(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Return the lines of a table whose cells are broken between words where they are longer than their column.

    >>> wrapped([("name", "what"), ("a", "one, two")], (4, 5))
    ['name  what', 'a     one,', '      two']
    """
    broken = [
        zip_longest(
            *(textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)), fillvalue=""
        )
        for row in rows
    ]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for row in broken
        for line in row
    ]
