"""A problem with a recipe: what, where (file:line:column), why, and one fix.

`recipe.load` finds the misspelt and mistyped, a stage's `check` what its options can't do to this model, and the
rules what can't be stacked; all of them speak `Problem`, so that the author sees every one of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Level = Literal["error", "warning"]
Loc = tuple[str | int, ...]
"""Path of a value inside the recipe: ("stages", 1, "quantize", "group_size")."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A place in a file. `line` and `column` count from 1; `text` is that line, `width` characters of it are meant."""

    file: str
    line: int
    column: int
    text: str = ""
    width: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a recipe.

    Attributes:
        code: Stable identifier; `optikit explain CODE` tells more, e.g. `group-divides-width`.
        message: One sentence with the value in it.
        fix: One sentence: the smallest change that helps.
        loc: Path of the offending value inside the recipe; turned into `mark` by whoever holds the file.
        level: Errors refuse the recipe; warnings are printed and kept in the report.
        source: Paper, documentation or source file behind the rule, if it has one.
        repair: Options by verb that mend it; of a tuple of values, one: {"compile": {"batch_size": (1, 2)}}.
    """

    code: str
    message: str
    fix: str = ""
    loc: Loc = ()
    level: Level = "error"
    mark: Mark | None = None
    source: str = ""
    repair: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)

    def at(self, mark: Mark | None) -> Problem:
        """Return this problem with its place filled in."""
        return replace(self, mark=mark)

    def under(self, *prefix: str | int) -> Problem:
        """Return this problem with `prefix` before its path: a stage knows its option, the plan knows which stage."""
        return replace(self, loc=(*prefix, *self.loc))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return the fix for a misspelt word: the nearest choice, or (the first dozen of) all where none is near.

    >>> did_you_mean("grop_size", ["bits", "group_size"])
    "did you mean 'group_size'?"
    >>> did_you_mean("colour", ["bits", "group_size"])
    'choose from bits, group_size'
    """
    import difflib

    choices = list(choices)
    folded = {choice.lower().replace("-", "_"): choice for choice in reversed(choices)}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1)
    if near:
        return f"did you mean {folded[near[0]]!r}?"
    listed = [*choices[:12], *(["…"] if len(choices) > 12 else [])]
    return f"choose from {', '.join(listed)}" if choices else ""
