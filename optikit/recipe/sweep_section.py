"""`sweep:` and `--vary`: what of a recipe varies, checked value by value, and how its variants are looked for.

    sweep:
      vary:
        stages[0].quantize.bits: [4, 8]
        target: [cpu, l4]
      search: grid
      budget: 2h

A path is written as for `--set`. Its values are put into the tree before variables are replaced and the schema is
asked, so that what is wrong with a value is told at the place where that value stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator

from optikit.described import Described
from optikit.problems import Mark, Problem
from optikit.recipe import overrides
from optikit.recipe.node import Node, plain

KEY = "sweep"
MOST_VALUES = 1000
"""Of one path, and variants of a grid."""
OPTION = "--vary"

Search = Literal["grid", "random", "halving", "optuna"]


class Sweep(Described):
    """Variants of a recipe that `optikit sweep` makes and compares; no other verb takes a recipe with this section."""

    model_config = ConfigDict(allow_inf_nan=False)

    vary: Mapping[str, tuple[Any, ...]] = {}
    """Values by path: {'stages[0].quantize.bits': [4, 8], model: [a, b]}; whole lists of stages by `stages`."""
    search: Search = "grid"
    """`grid`: every combination. `random`: some of them. `halving`: all, or `samples`, of them measured cheaply; the
    better third goes on to more windows, and so on. `optuna`: what its sampler asks for; needs optuna."""
    samples: int | None = Field(default=None, ge=1, le=MOST_VALUES)
    """How many combinations: of `random` and `optuna` 16 where it isn't said, of `halving` all."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of what is drawn."""
    budget: str = ""
    """Where to stop: `90m`, `2h`, or `$20` of machines whose price `--usd-per-hour` says. Empty is no bound."""

    @field_validator("budget")
    @classmethod
    def _readable(cls, text: str) -> str:
        parse_budget(text)
        return text


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a sweep may take; None is no bound."""

    seconds: float | None = None
    usd: float | None = None


_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_budget(text: str) -> Budget:
    """Return what a budget allows.

    Raises:
        ValueError: It is neither a time nor a price; the text behind the semicolon is what to write.

    >>> parse_budget("90m"), parse_budget("$2.50"), parse_budget("")
    (Budget(seconds=5400.0, usd=None), Budget(seconds=None, usd=2.5), Budget(seconds=None, usd=None))
    """
    if not text:
        return Budget()
    money = re.fullmatch(r"\$(\d{1,9}(?:\.\d{1,9})?)", text.strip())
    time = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|m|min|h|d)", text.strip())
    value = float(money[1]) if money else float(time[1]) * _UNITS[time[2]] if time else 0.0
    if value <= 0:
        msg = f"budget can't be {text[:40]!r}; write a time (90m, 2h) or a price ($20)"
        raise ValueError(msg)
    return Budget(usd=value) if money else Budget(seconds=value)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One path and its values.

    Attributes:
        text: The path as it is written.
        path: Its parts.
        values: At least one, none twice.
        mark: Where the path stands.
    """

    text: str
    path: tuple[overrides.Part, ...]
    values: tuple[Node, ...]
    mark: Mark

    @property
    def plain(self) -> tuple[Any, ...]:
        """The values as plain data."""
        return tuple(plain(value) for value in self.values)


def axes(root: Node, varied: Sequence[str]) -> tuple[tuple[Axis, ...], tuple[Problem, ...]]:
    """Return what a recipe's section and the command line vary, the command line's in the place of the section's.

    Args:
        root: The recipe with its section.
        varied: `--vary` arguments: `stages[0].quantize.bits=4,8`.
    """
    problems: list[Problem] = []
    found: dict[str, Axis] = {}
    section = root.child(KEY)
    written = section.child("vary") if section else None
    for text, values in (written.value if written and isinstance(written.value, dict) else {}).items():
        _add(found, problems, partial(_of_file, text, values))
    for number, argument in enumerate(varied, start=1):
        _add(found, problems, partial(_of_option, argument, number))
    return tuple(found.values()), tuple(problems)


def _add(found: dict[str, Axis], problems: list[Problem], make: Callable[[], Axis]) -> None:
    try:
        axis = make()
        _require_sound(axis)
    except overrides.BadOverrideError as bad:
        problems.append(replace(bad.problem, code="bad-sweep"))
    else:
        found[axis.text] = axis


def _of_file(text: str, values: Node) -> Axis:
    mark = values.key or values.mark
    if not isinstance(values.value, tuple):
        message = f"the values of {text!r} must be a list"
        raise overrides.BadOverrideError(message, f"write `{text}: [{_shown(values)}]`", values.mark)
    path = overrides.path(text, lambda *_: mark)
    return Axis(text=text, path=path, values=values.value, mark=mark)


def _shown(values: Node) -> str:
    return "…" if isinstance(values.value, dict | tuple) or values.value is None else str(values.value)


def _of_option(argument: str, number: int) -> Axis:
    def mark(start: int, end: int) -> Mark:
        return Mark(file=OPTION, line=number, column=start + 1, text=argument, width=max(1, end - start))

    text, equals, values = argument.partition("=")
    whole = mark(0, len(argument))
    if not equals:
        message = f"{argument!r} has no '='"
        raise overrides.BadOverrideError(message, "write for example stages[0].quantize.bits=4,8", whole)
    nodes = []
    for start, end in pieces(values):
        at = len(text) + 1
        nodes.append(overrides.value(values[start:end], mark(at + start, at + end)))
    return Axis(text=text, path=overrides.path(text, mark), values=tuple(nodes), mark=mark(0, len(text)))


def pieces(text: str) -> list[tuple[int, int]]:
    """Return where the parts of a text lie between commas that stand in no brackets and no quotes.

    >>> text = "4, [1, 2],{a: 'x,y'}"
    >>> [text[start:end] for start, end in pieces(text)]
    ['4', ' [1, 2]', "{a: 'x,y'}"]
    """
    found, start, depth, quote = [], 0, 0, ""
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "," and depth == 0:
            found.append((start, at))
            start = at + 1
        else:
            depth += (letter in "[{") - (letter in "]}")
    return [*found, (start, len(text))]


def _require_sound(axis: Axis) -> None:
    def refuse(message: str, fix: str, mark: Mark) -> None:
        raise overrides.BadOverrideError(message, fix, mark)

    if axis.path[0].name in (KEY, "extends"):
        refuse(f"{axis.text!r} can't vary", "name a value of the recipe", axis.mark)
    if not 1 <= len(axis.values) <= MOST_VALUES:
        count = len(axis.values) or "no"
        refuse(f"{axis.text!r} has {count} values", f"give it 1 to {MOST_VALUES}", axis.mark)
    seen: list[Any] = []
    for value, node in zip(axis.plain, axis.values, strict=True):
        if any(type(value) is type(other) and value == other for other in seen):
            refuse(f"{axis.text!r} has the same value twice", "write each once", node.place)
        seen.append(value)


def put(root: Node, chosen: Sequence[tuple[Axis, Node]]) -> tuple[Node, tuple[Problem, ...]]:
    """Return the recipe without its section and with a value at each path, and the problems of paths it doesn't have.

    Whole lists of stages come first, so that another path may change what lies in each.
    """
    entries = root.value if isinstance(root.value, dict) else {}
    root = replace(root, value={name: child for name, child in entries.items() if name != KEY})
    problems = []
    for axis, value in sorted(chosen, key=lambda pair: len(pair[0].path)):
        try:
            root = overrides.put(root, axis.path, value)
        except overrides.BadOverrideError as bad:
            problems.append(replace(bad.problem, code="bad-sweep"))
    return root, tuple(problems)
