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


Edit = Literal["write", "entry", "drop", "beside", "align", "item", "list", "indent", "name", "merge"]


@dataclass(frozen=True, kw_only=True)
class Hint:
    """A fix that a program can make in the text, at the problem's mark.

    Attributes:
        edit: `write` puts `text` in the place of the marked key or value, `entry` in the place of the marked key and
            its value, `drop` takes both away, `beside` puts `text` behind the entry whose value is marked. The others
            mend the layout around the mark: see `rules.yaml_hints`.
        text: What to write.
        told: What that is, as a clause: "rename 'w_bit' to 'bits'".
        lost: What the author wrote that is gone afterwards, as a clause; nothing where the meaning stays.
    """

    edit: Edit
    text: str = ""
    told: str = ""
    lost: str = ""


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
        repair: Options by verb that mend it; of a tuple of values, one: {"compile": {"batch_size": (1, 2)}}. A verb
            without options: its stage goes.
        hint: `fix` as an edit of the text, where it is one.
    """

    code: str
    message: str
    fix: str = ""
    loc: Loc = ()
    level: Level = "error"
    mark: Mark | None = None
    source: str = ""
    repair: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    hint: Hint | None = field(default=None, compare=False)

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
    choices = list(choices)
    near = nearest(word, choices)
    if near:
        return f"did you mean {near!r}?"
    listed = [*choices[:12], *(["…"] if len(choices) > 12 else [])]
    return f"choose from {', '.join(listed)}" if choices else ""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is most like a word, if one is like it."""
    import difflib

    folded = {choice.lower().replace("-", "_"): choice for choice in reversed(list(choices))}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1)
    return folded[near[0]] if near else None


def misspelt(word: str, choices: Iterable[str]) -> str | None:
    """Return the one choice that a word is surely meant to be; None where it may mean something else.

    Case, dashes and underscores don't count; of the rest one letter may be wrong, missing, too much or swapped with the
    next, in long words a few. Figures must be the same: `int4` is no misspelt `int8`.

    >>> misspelt("grop_size", ["bits", "group_size"]), misspelt("GPTQ", ["awq", "gptq"])
    ('group_size', 'gptq')
    >>> misspelt("int4", ["int8"]), misspelt("quantization", ["calibration"]), misspelt("vllm", ["neuron"])
    (None, None, None)
    """
    wanted = _folded(word)
    by_likeness: dict[float, list[str]] = {}
    for choice in choices:
        by_likeness.setdefault(_likeness(wanted, _folded(choice)), []).append(choice)
    best = max(by_likeness, default=0.0)
    return by_likeness[best][0] if best > 0 and len(by_likeness[best]) == 1 else None


def _folded(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")


def _likeness(word: str, choice: str) -> float:
    """Return how surely `choice` is meant: 1 for the same letters, 0 for another word."""
    import difflib

    if [c for c in word if c.isdigit()] != [c for c in choice if c.isdigit()]:
        return 0.0
    ratio = difflib.SequenceMatcher(None, word, choice).ratio()
    return ratio if (len(choice) >= 3 and _one_slip(word, choice)) or (len(choice) >= 8 and ratio >= 0.85) else 0.0


def _one_slip(word: str, choice: str) -> bool:
    """Return whether one letter changed, added, left out or swapped with the next makes a word of the other."""
    short, long = sorted((word, choice), key=len)
    start = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(long) == len(short):
        swapped = short[start : start + 2] == long[start : start + 2][::-1] and short[start + 2 :] == long[start + 2 :]
        return swapped or short[start + 1 :] == long[start + 1 :]
    return short[start:] == long[start + 1 :]
