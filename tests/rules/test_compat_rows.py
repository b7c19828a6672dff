"""Every rule can fire, alone, and a near miss doesn't make it fire. Run: pytest tests/rules."""

from __future__ import annotations

import datetime as dt
import importlib.util
import json
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from optikit.rules import check, rules
from optikit.rules.conditions import Condition, questions

spec = importlib.util.spec_from_file_location("stacks", Path(__file__).with_name("stacks.py"))
stacks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stacks)

ROWS = tomllib.loads(resources.files("optikit.rules").joinpath("compat.toml").read_text(encoding="utf-8"))["rule"]


def codes(case: dict) -> list[str]:
    return [problem.code for problem in check(stacks.stack(case))]


def test_every_rule_has_a_case_and_every_case_a_rule():
    assert sorted(stacks.CASES) == sorted(rules())


@pytest.mark.parametrize("name", stacks.CASES)
def test_rule_fires_alone(name):
    case = {key: value for key, value in stacks.CASES[name].items() if key != "near"}
    assert codes(case) == [name]


@pytest.mark.parametrize("name", stacks.CASES)
def test_near_miss_does_not_fire(name):
    assert name not in codes(stacks.near(stacks.CASES[name]))


@pytest.mark.parametrize("name", stacks.CASES)
def test_problem_tells_values_and_points_into_the_recipe(name):
    case = {key: value for key, value in stacks.CASES[name].items() if key != "near"}
    (problem,) = check(stacks.stack(case))
    assert problem.level == rules()[name].level
    assert "{stage." not in problem.message
    assert "{serve." not in problem.message
    assert problem.fix
    if problem.loc[:1] == ("stages",) and len(problem.loc) > 1:
        index, verb = problem.loc[1:3]
        assert case["stages"][index].startswith(verb)


def test_at_least_a_hundred_rules():
    assert len(rules()) >= 100


def test_ids_are_unique():
    ids = [row["id"] for row in ROWS]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_rows_are_complete(row):
    assert row["why"].strip()
    assert row["fix"].strip()
    assert len(row["source"]) > 8
    assert dt.date.fromisoformat(row["date"]) <= dt.datetime.now(tz=dt.UTC).date()
    assert not row["why"].endswith(".")


def test_no_two_rules_contradict():
    """The same condition twice would say two things of one stack."""
    seen: dict[str, str] = {}
    for row in ROWS:
        condition = json.dumps(row["when"], sort_keys=True)
        assert condition not in seen, f"{row['id']} repeats {seen[condition]}"
        seen[condition] = row["id"]


def every_condition() -> list[tuple[str, Condition]]:
    return [(rule.id, rule.when) for rule in rules().values()]


@pytest.mark.parametrize(("name", "when"), every_condition(), ids=lambda value: value if isinstance(value, str) else "")
def test_version_specifiers_are_valid(name, when):
    from packaging.specifiers import SpecifierSet

    for question in questions(when):
        if question.operator == "version":
            SpecifierSet(question.operand)
