"""Problems as text: place, sentence, the line with a caret under what is meant, one fix.

    recipe.yaml:7:5: error: unknown key 'grop_size' [unknown-key]
      7 |     grop_size: 64
        |     ^^^^^^^^^
        = fix: did you mean 'group_size'?

A recipe is somebody else's text: control characters, escape sequences and invisible direction marks are shown as
escapes, so that printing an error can neither drive the terminal nor display another line than the file has.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from optikit.problems import Mark, Problem

_WIDTH = 100
"""Columns of a source line that are shown; longer ones are cut around the caret."""
_MOST = 50
"""Problems shown in full; a file that isn't a recipe at all could have thousands."""
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that are shown as escapes: control, format (direction marks), surrogates, separators."""
_RED, _YELLOW, _CYAN, _BOLD, _RESET = "\033[1;31m", "\033[1;33m", "\033[36m", "\033[1m", "\033[0m"


def render_problems(problems: Sequence[Problem], *, colour: bool = False) -> str:
    """Return the problems as lines of text, in their order, a blank line between two.

    Args:
        problems: What to show; without a mark only the sentence is shown.
        colour: Use ANSI colours; escapes of the recipe's own text are made visible in any case.
    """
    blocks = [_block(problem, colour=colour) for problem in problems[:_MOST]]
    if len(problems) > _MOST:
        blocks.append(f"... and {len(problems) - _MOST} more problems")
    return "\n\n".join(blocks)


def visible(text: str) -> str:
    r"""Return the text with every character that a terminal would act on or hide written as an escape.

    >>> print(visible("a\x1b[31m\u202eb"))
    a\x1b[31m\u202eb
    """
    return "".join(_escape(c) if unicodedata.category(c) in _UNSAFE else c for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _block(problem: Problem, *, colour: bool) -> str:
    def paint(style: str, text: str) -> str:
        return f"{style}{text}{_RESET}" if colour and text else text

    style = _RED if problem.level == "error" else _YELLOW
    place = f"{visible(str(problem.mark))}: " if problem.mark else ""
    sentence = f"{paint(_BOLD, place)}{paint(style, problem.level)}: {visible(problem.message)} [{problem.code}]"
    lines = [sentence]
    gutter = "   "
    if problem.mark and problem.mark.text:
        number = str(problem.mark.line)
        gutter = " " * (len(number) + 3)
        source, caret = _excerpt(problem.mark)
        bar = paint(_CYAN, "|")
        lines += [f"  {paint(_CYAN, number)} {bar} {source}", f"{gutter}{bar} {paint(style, caret)}"]
    lines += [f"{gutter}{paint(_CYAN, '=')} fix: {visible(problem.fix)}"] if problem.fix else []
    lines += [f"{gutter}{paint(_CYAN, '=')} source: {visible(problem.source)}"] if problem.source else []
    return "\n".join(lines)


def _excerpt(mark: Mark) -> tuple[str, str]:
    """Return the source line, cut around the mark where it is long, and the caret line below it."""
    text, start = mark.text, mark.column - 1
    first = max(0, start - _WIDTH // 2) if len(text) > _WIDTH else 0
    last = first + _WIDTH
    head, tail = "..." if first else "", "..." if last < len(text) else ""
    before = head + _shown(text[first:start])
    meant = _shown(text[start : min(start + mark.width, last)])
    after = _shown(text[start:last])[len(meant) :] + tail
    return (before + meant + after).rstrip(), " " * _columns(before) + "^" * max(1, _columns(meant))


def _shown(text: str) -> str:
    return visible(text.replace("\t", " "))


def _columns(text: str) -> int:
    """Return the width of a text on a terminal: East Asian wide characters take two columns, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
