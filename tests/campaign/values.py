"""Odd values, and JSON with some of them in it."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -0.0, 1e-320, 1e308, float("inf"), float("nan")),
    *("", " ", "\0", "\x1b[2J\x1b]0;owned\x07", "\u202egpj.exe", "::error::owned", "a\nb", "\ud800", "x" * 100_000),
    *("../../../etc/passwd", "/dev/zero", "/etc/shadow", "file:///etc/passwd", "http://127.0.0.1:1/x", "hf:a/b@c", "~"),
    *("${HOME}", "$(id)", "!!python/object:os.system", "4", "0x10", "1e3", "on", "null", "2024-01-01", "%s%n", "{0}"),
    *([], {}, [[]], [None], {"": ""}, [{}] * 50, {"a": {"b": {"c": {}}}}, list(range(1000)), ["x"] * 300),
)


def changed(value: Any, random: Random, times: int = 1) -> Any:
    """Return a value made of dictionaries and lists with something put, renamed, doubled or taken away in it."""
    found = copy.deepcopy(value)
    for _ in range(times):
        places = list(_places(found))
        if not places:
            return random.choice(VALUES)
        inside, at = random.choice(places)
        how = random.randrange(6)
        if how == 0:
            del inside[at]
        elif how == 1 and isinstance(inside, dict):
            inside[str(random.choice(VALUES))[:40]] = inside.pop(at)
        elif how == 2 and isinstance(inside, list):
            inside += inside * random.choice([1, 20])
        else:
            inside[at] = copy.deepcopy(random.choice(VALUES))
    return found


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    for key in keys:
        found += _places(value[key])
    return found
