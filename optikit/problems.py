"""A problem with a recipe: what, where (file:line:column), why, and one fix.

`recipe.load` finds the misspelt and mistyped, a stage's `check` what its options can't do to this model, and the
rules what can't be stacked; all of them speak `Problem`, so that the author sees every one of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["error", "warning"]
Loc = tuple[str | int, ...]
"""Path of a value inside the recipe: ("stages", 1, "quantize", "group_size")."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A place in a file. `line` and `column` count from 1; `text` is that line, for the caret."""

    file: str
    line: int
    column: int
    text: str = ""

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
    """

    code: str
    message: str
    fix: str = ""
    loc: Loc = ()
    level: Level = "error"
    mark: Mark | None = None
    source: str = ""

    def at(self, mark: Mark | None) -> Problem:
        """Return this problem with its place filled in."""
        return replace(self, mark=mark)

    def under(self, *prefix: str | int) -> Problem:
        """Return this problem with `prefix` before its path: a stage knows its option, the plan knows which stage."""
        return replace(self, loc=(*prefix, *self.loc))
