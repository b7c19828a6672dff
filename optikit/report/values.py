"""Values of no fixed shape (options and findings of a step, what speculation brought) in words, names and units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optikit import text
from optikit.report import gates


def listed(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return a free-form mapping as (name, value) in words; nested values become dotted names.

    >>> listed({"memory_bytes": 2**34, "speedup": {"value": 1.33, "ci95": [1.29, 1.37]}, "draft": {"heads": 3}})
    (('memory', '16.0 GiB'), ('speedup', '1.33× (1.29–1.37×)'), ('draft heads', '3'))
    """
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = str(key)
        words = text.clean(name).replace("_", " ")
        if isinstance(value, Mapping) and not _is_ratio(value):
            found += [(f"{words} {inner}", shown) for inner, shown in listed(value)]
        elif _is_number(value) and (unit := next((end for end in _UNITS if name.endswith(end)), "")):
            found.append((text.clean(name.removesuffix(unit)).replace("_", " "), _UNITS[unit](value)))
        else:
            found.append((words, worded(value)))
    return tuple(found)


_UNITS: Mapping[str, Callable[[float], str]] = {"_bytes": text.size, "_mib": text.memory, "_seconds": text.duration}
"""Endings of names whose numbers are easier to read in a larger unit."""


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return free-form records as (header, rows) in words; the columns are every name that occurs, in order."""
    names = tuple(dict.fromkeys(str(name) for row in rows for name in row))
    by_name = ({str(name): value for name, value in row.items()} for row in rows)
    header = tuple(text.clean(name).replace("_", " ") for name in names)
    return header, tuple(tuple(_named(name, row[name]) if name in row else "–" for name in names) for row in by_name)


def _named(name: str, value: Any) -> str:
    """Write a value of a known name in that name's unit."""
    if name == "step":
        return text.step_words(str(value))
    return gates.number(name, value) if _is_number(value) else worded(value)


def worded(value: Any) -> str:
    """Write any JSON value for people: numbers rounded, lists with commas, ratios with their intervals."""
    if isinstance(value, Mapping):
        return _worded_ratio(value) if _is_ratio(value) else "; ".join(f"{k}: {v}" for k, v in listed(value))
    if isinstance(value, list | tuple):
        return ", ".join(worded(item) for item in value) or "none"
    if isinstance(value, bool) or value is None:
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return text.number(value) if isinstance(value, float) else text.clean(str(value))


def _worded_ratio(given: Mapping[str, Any]) -> str:
    value = float(given["value"])
    if not given.get("ci95"):
        return text.ratio(value)
    ci95 = (float(given["ci95"][0]), float(given["ci95"][1]))
    return f"{text.ratio(value, ci95)} ({text.ratio_interval(value, ci95)})"


def _is_ratio(value: Mapping[str, Any]) -> bool:
    """Tell whether a mapping is {value, ci95, …}: a ratio as the schema writes it."""
    if not isinstance(value.get("value"), int | float):
        return False
    ci95 = value.get("ci95")
    return ci95 is None or (isinstance(ci95, list | tuple) and len(ci95) == 2 and all(_is_number(end) for end in ci95))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
