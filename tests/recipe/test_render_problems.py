"""Problems as text: carets under the right characters, nothing that drives a terminal."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.problems import Mark, Problem
from optikit.recipe.render_problems import render_problems, visible


def rendered(text: str, column: int, width: int, message: str = "no", file: str = "r.yaml", fix: str = "") -> str:
    mark = Mark(file=file, line=3, column=column, text=text, width=width)
    return render_problems([Problem(code="c", message=message, fix=fix, mark=mark)])


def test_layout() -> None:
    warning = Problem(code="old", message="m", fix="f", level="warning", source="https://x")
    mark = Mark(file="r.yaml", line=120, column=3, text="a: b", width=9)
    assert render_problems([warning.at(mark), warning]) == (
        "r.yaml:120:3: warning: m [old]\n"
        "  120 | a: b\n"
        "      |   ^^\n"
        "      = fix: f\n"
        "      = source: https://x\n"
        "\n"
        "warning: m [old]\n"
        "   = fix: f\n"
        "   = source: https://x"
    )


def test_colour_adds_nothing_but_colour() -> None:
    problem = Problem(code="c", message="m", fix="f", mark=Mark(file="r", line=1, column=1, text="\x1b[31mx", width=2))
    plain, coloured = render_problems([problem]), render_problems([problem], colour=True)
    assert plain != coloured
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) == plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J\x07", r"a\x1b[2J\x07"),
        ("a\u202eb\u2066c\u200bd\ufeff", r"a\u202eb\u2066c\u200bd\ufeff"),
        ("a\nb\rc\x9b", r"a\nb\rc\x9b"),
        ("\ud800\u2028", r"\ud800\u2028"),
        ("é 日本 🙂", "é 日本 🙂"),
    ],
)
def test_terminal_controls_are_shown_as_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown
    got = rendered(text.replace("\n", "").replace("\r", ""), 1, 1, message=text, file=text, fix=text)
    assert got.count(shown) >= 3
    assert all(unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in got.replace("\n", ""))


@pytest.mark.parametrize(
    ("text", "column", "width", "source", "caret"),
    [
        ("key: value", 6, 5, "key: value", "     ^^^^^"),
        ("\tkey: x", 2, 3, " key: x", " ^^^"),
        ("日本: x", 5, 1, "日本: x", "      ^"),
        ("a: 日本", 4, 2, "a: 日本", "   ^^^^"),
        ("e\u0301: x", 5, 1, "e\u0301: x", "   ^"),
        ("\x1b: x", 4, 1, r"\x1b: x", "      ^"),
        ("key:", 5, 1, "key:", "    ^"),
        ("key:", 99, 1, "key:", "    ^"),
    ],
)
def test_caret(text: str, column: int, width: int, source: str, caret: str) -> None:
    lines = rendered(text, column, width).splitlines()
    assert lines[1:] == [f"  3 | {source}", f"    | {caret}"]


def test_long_lines_are_cut_around_the_caret() -> None:
    text = "x" * 5000 + "HERE" + "y" * 5000
    _, source, caret = rendered(text, 5001, 4).splitlines()
    assert len(source) < 120
    assert source[caret.index("^") :][: caret.count("^")] == "HERE"
    assert source.split("| ")[1].startswith("...")
    assert source.endswith("...")
    _, _, caret = rendered(text, 5001, 5004).splitlines()
    assert caret.endswith("^")
    assert len(caret) < 120


def test_thousands_of_problems_are_counted() -> None:
    problem = Problem(code="c", message="m")
    assert render_problems([problem] * 51).endswith("... and 1 more problems")
    assert render_problems([]) == ""


@given(st.text(st.characters(exclude_characters="\n\r\x85\u2028\u2029")), st.integers(1, 300), st.integers(1, 300))
def test_any_line_can_be_shown(text: str, column: int, width: int) -> None:
    lines = rendered(text, column, width, message=text, fix=text).split("\n")
    assert len(lines) == 1 + 2 * bool(text) + bool(text)
    assert all(unicodedata.category(c) not in {"Cc", "Cf", "Cs"} for line in lines for c in line)
    if text:
        assert "^" in lines[2]
