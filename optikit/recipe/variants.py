"""The variants of a recipe: one loaded recipe for each combination of the values that vary, with a name of its own."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from optikit.errors import RecipeError
from optikit.problems import Problem
from optikit.recipe import load
from optikit.recipe.load import LoadedRecipe
from optikit.recipe.node import Node
from optikit.recipe.sweep_section import KEY, MOST_VALUES, Axis, Sweep, axes, put
from optikit.recipe.validate import section as checked

Choice = tuple[int, ...]
"""Which value of each axis."""
MOST_NAME = 60
DRAWN = 16
"""Combinations of a search that draws, where the recipe doesn't say how many."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One combination.

    Attributes:
        name: Short, unique in the sweep, a directory's name.
        values: What varies, by path.
        choice: Which value of each axis that is.
        loaded: The recipe; None where it isn't valid.
        problems: Why it isn't.
    """

    name: str
    values: Mapping[str, Any]
    choice: Choice
    loaded: LoadedRecipe | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Varied:
    """A recipe and what of it varies."""

    path: Path
    base: Path
    section: Sweep
    axes: tuple[Axis, ...]
    root: Node = field(repr=False)
    known_targets: Collection[str] | None = None

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return prod(len(axis.values) for axis in self.axes)

    def choices(self) -> tuple[Choice, ...]:
        """Return the combinations to begin with: all of a grid, or as many as are to be drawn, drawn by the seed."""
        section = self.section
        drawn = section.samples or (self.size if section.search in ("grid", "halving") else DRAWN)
        if drawn >= self.size:
            return tuple(self.choice(number) for number in range(self.size))
        numbers = sorted(random.Random(section.seed).sample(range(self.size), drawn))  # noqa: S311 - a search
        return tuple(self.choice(number) for number in numbers)

    def choice(self, number: int) -> Choice:
        """Return the combination of a number below `size`; the last axis changes first."""
        found: list[int] = []
        for axis in reversed(self.axes):
            number, index = divmod(number, len(axis.values))
            found.insert(0, index)
        return tuple(found)

    def variant(self, choice: Choice) -> Variant:
        """Return the variant of a combination."""
        chosen = [(axis, axis.values[index]) for axis, index in zip(self.axes, choice, strict=True)]
        root, problems = put(self.root, chosen)
        values = {axis.text: axis.plain[index] for axis, index in zip(self.axes, choice, strict=True)}
        known = Variant(name=self.name(choice), values=values, choice=choice)
        try:
            loaded = load.resolved(root, problems, self.path, base=self.base, known_targets=self.known_targets)
        except RecipeError as error:
            return replace(known, problems=error.problems)
        return replace(known, loaded=loaded)

    def name(self, choice: Choice) -> str:
        """Return the name of a combination: what varies, with its values; only words that differ are in it."""
        varying = [(axis, index) for axis, index in zip(self.axes, choice, strict=True) if len(axis.values) > 1]
        heads = dict(zip([axis.text for axis, _ in varying], _heads([axis for axis, _ in varying]), strict=True))
        words = [f"{heads[axis.text]}-{_words(axis)[index]}" for axis, index in varying]
        name = "_".join(words) or "only"
        if len(name) <= MOST_NAME:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return f"{name[: MOST_NAME - 9]}-{digest}"


def read(
    path: Path,
    *,
    varied: Sequence[str] = (),
    overrides: Sequence[str] = (),
    changed: Mapping[str, Any] | None = None,
    known_targets: Collection[str] | None = None,
) -> Varied:
    """Read a recipe and what of it varies.

    Args:
        path: The recipe.
        varied: `--vary` arguments.
        overrides: `--set` arguments.
        changed: Keys of the section that the command line decides: search, samples, seed, budget.
        known_targets: Names that a variant's target may have.

    Raises:
        InputMissingError: If the file can't be read.
        RecipeError: What varies is wrong, or nothing does; with every problem.
    """
    root, problems = load.tree(load.read(path), path, overrides)
    section, found = checked(root, Sweep, KEY)
    problems += found
    along, found = axes(root, varied)
    places = {problem.mark for problem in problems}
    problems += tuple(problem for problem in found if problem.mark not in places)
    if problems or section is None:
        raise load.error(path, problems)
    section = section.model_copy(update=dict(changed or {}))
    if not along:
        raise RecipeError(
            f"nothing of {path.name} varies", fix="give --vary 'stages[0].quantize.bits=4,8', or `sweep:`"
        )
    known = Varied(path=path, base=path.parent, section=section, axes=along, root=root, known_targets=known_targets)
    if section.samples is None and section.search in ("grid", "halving") and known.size > MOST_VALUES:
        message = f"{known.size} combinations are more than {MOST_VALUES}"
        raise RecipeError(message, fix="draw some: `search: random` and `samples: 32`")
    return known


def _heads(along: Sequence[Axis]) -> list[str]:
    """Return the shortest ends of paths that tell them apart."""
    paths = [[str(part.name) for part in axis.path] for axis in along]
    heads = []
    for path in paths:
        length = 1
        while length < len(path) and sum(other[-length:] == path[-length:] for other in paths) > 1:
            length += 1
        heads.append(_slug("-".join(path[-length:])))
    return heads


def _words(axis: Axis) -> list[str]:
    """Return a word for each value of an axis, no two alike."""
    words = [_slug(_word(value)) for value in axis.plain]
    return [word if words.count(word) == 1 else f"{word}-{at}" for at, word in enumerate(words, start=1)]


def _word(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return "+".join(_stage(each) for each in value)
    if isinstance(value, str):
        return Path(value).name or value
    return json.dumps(value)


def _stage(entry: Mapping[str, Any]) -> str:
    """Return the method of a stage, with its bits."""
    options = next(iter(entry.values()), None)
    if not isinstance(options, dict):
        return str(next(iter(entry), ""))
    return str(options.get("method", options.get("engine", next(iter(entry))))) + str(options.get("bits", ""))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+]+", "-", text).strip("-.")[:40] or "x"


def lines_of(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what varies, for people."""
    for path, value in values.items():
        yield f"{path}: {json.dumps(value, ensure_ascii=False)}"
