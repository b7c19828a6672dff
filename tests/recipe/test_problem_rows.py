"""Every code that loading and planning put behind a message can be explained, and every explained code exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from optikit.cli import explain
from optikit.problems import did_you_mean

PACKAGE = Path(explain.__file__).parents[1]
CODE = re.compile(r'(?:code=|_Bad\(|Sentence\(|_problem\(|return |^\s+)"([a-z0-9]+(?:-[a-z0-9]+)+)"', re.MULTILINE)


def codes() -> set[str]:
    sources = [
        *(PACKAGE / "recipe").glob("*.py"),
        *(PACKAGE / "plan").glob("*.py"),
        PACKAGE / "stages" / "measure" / "served.py",
        PACKAGE / "targets" / "target.py",
        PACKAGE / "stage.py",
    ]
    return {code for path in sources for code in CODE.findall(path.read_text(encoding="utf-8"))}


def test_every_code_of_loading_and_planning_is_explained():
    named = {code for code in codes() if code in explain._problems() or explain._problem(code)}
    assert codes() == named


def test_every_explained_code_is_one():
    assert set(explain._problems()) <= codes()


@pytest.mark.parametrize("code", sorted(explain._problems()))
def test_a_row_is_complete(code):
    row = explain._problems()[code]
    assert {"what", "why"} <= set(row) <= {"what", "why", "wrong", "right"}
    assert code in explain._problem(code)
    assert not row["what"].endswith(".")


def test_a_stages_own_check_names_its_stages():
    assert "speculate.draft" in explain._checked("draft-too-large")
    assert explain._checked("no-such-code") == ""
    assert "unknown-key" in did_you_mean("unknown_keys", explain._names())
