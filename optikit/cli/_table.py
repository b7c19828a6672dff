"""Plain tables for the terminal: aligned columns, no colour, readable when piped."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first row is its heading.

    >>> table([("name", "size"), ("a", "1"), ("bb", "22")])
    ['name  size', 'a     1', 'bb    22']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
