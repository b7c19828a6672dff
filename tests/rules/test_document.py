"""The pages of rules are what the rows say, and what the tests plan."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from optikit.rules import rules
from optikit.rules.document import family, markdown

PAGE = Path(__file__).parents[2] / "examples" / "rules.md"


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == markdown(), "optikit explain --list --markdown > examples/rules.md"


def test_page_has_every_rule_once():
    text = markdown()
    assert all(text.count(f"### `{name}` (") == 1 for name in rules())


def test_every_rule_has_a_family():
    assert all(family(rule) for rule in rules().values())


def test_headings_do_not_repeat():
    headings = [line for line in markdown().splitlines() if line.startswith("## ")]
    assert len(headings) == len(set(headings))


def test_page_of_recipes_is_up_to_date():
    script = Path(__file__).parents[1] / "benchmarks" / "rules_fired.py"
    spec = importlib.util.spec_from_file_location("rules_fired", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "python tests/benchmarks/rules_fired.py"
