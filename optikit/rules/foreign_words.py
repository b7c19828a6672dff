"""Words of other tools in a recipe: what they are called here, from `foreign_words.toml`.

`find` answers for a key, `method` for a method or an engine. Nothing here reads a recipe.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from optikit.problems import Hint

TOP = "top"
"""The place of a recipe's outermost keys."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """Another tool's key.

    Attributes:
        name: As that tool writes it.
        tool: Whose it is.
        becomes: Our key for it; "" where there is none.
        values: Their values → ours, as written in YAML; empty where values are the same.
        without: Why it can go without a loss.
        when: Values of which `without` is true; all where empty.
        told: What to say where nothing can be written for the author.
    """

    name: str
    tool: str
    becomes: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    without: str = ""
    when: tuple[str, ...] = ()
    told: str = ""

    def fix(self) -> str:
        """Return what to do about it, as a sentence."""
        if self.told:
            return self.told
        if not self.becomes:
            return f"leave {self.tool}'s {self.name!r} out: {self.without}"
        worth = ", ".join(f"{ours} for {theirs}" for theirs, ours in self.values.items())
        return f"write {self.becomes!r}: {self.name!r} is a word of {self.tool}" + (f" ({worth})" if worth else "")

    def hint(self, value: Any) -> Hint | None:
        """Return the edit that says the same in our words; None where it can't be said for this value."""
        written = _written(value)
        if self.without and (not self.when or written in self.when):
            told = f"leave out {self.name!r} of {self.tool}: {self.without}"
            return Hint(edit="drop", told=told)
        if not self.becomes:
            return None
        told = f"rename {self.name!r} of {self.tool} to {self.becomes!r}"
        if not self.values:
            return Hint(edit="write", text=self.becomes, told=told)
        ours = self.values.get(written)
        return Hint(edit="entry", text=f"{self.becomes}: {ours}", told=f"{told}, {ours}") if ours is not None else None


def _written(value: Any) -> str:
    """Return a value as the table writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("optikit.rules").joinpath("foreign_words.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def words() -> Mapping[str, tuple[Word, ...]]:
    """Return every word by place: a path of keys, verb.method, or a verb for all of its methods."""
    return {
        place: tuple(Word(name=name, **{**row, "when": tuple(row.get("when", ()))}) for name, row in rows.items())
        for place, rows in _table().items()
        if place != "methods"
    }


def find(places: Iterable[str], name: str, known: Collection[str]) -> Word | None:
    """Return another tool's key, where what it becomes is a key of this place.

    Args:
        places: Where it stands, the most exact first: ("quantize.gptq", "quantize").
        name: As written.
        known: Keys that there are here.
    """
    for place in places:
        for word in words().get(place, ()):
            if word.name == name and (not word.becomes or word.becomes in known):
                return word
    return None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method, an engine or a scheme of other tools.

    Attributes:
        told: What to do about it.
        instead: Options that are the nearest; none where the stage is to go.
        remove: The stage has nothing to do here.
    """

    told: str
    instead: Mapping[str, Any] = field(default_factory=dict)
    remove: bool = False

    def repair(self, verb: str) -> Mapping[str, Mapping[str, Any]]:
        """Return the same as a problem's `repair`."""
        options = {name: tuple(each) if isinstance(each, list) else each for name, each in self.instead.items()}
        return {verb: options} if options or self.remove else {}


def method(verb: str, name: str) -> Method | None:
    """Return what is known of a method or an engine of other tools."""
    row = _table()["methods"].get(verb, {}).get(name.lower().replace("_", "-").replace(".", "-"))
    return None if row is None else Method(**row)
