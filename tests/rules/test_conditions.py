"""Conditions: three-valued logic, operators, and what a row may not say. Run: pytest tests/rules/test_conditions.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.rules.conditions import OPERATORS, describe, fields, holds, lookup, parse


def decide(table, **scope):
    return holds(parse(table), scope)


@pytest.mark.parametrize(
    ("question", "value", "verdict"),
    [
        ({"is": 4}, 4, True),
        ({"is_not": 4}, 4, False),
        ({"in": [1, 2]}, 2, True),
        ({"not_in": [1, 2]}, 3, True),
        ({"lt": 5}, 5, False),
        ({"le": 5}, 5, True),
        ({"gt": 5}, 6, True),
        ({"ge": 5}, 4, False),
        ({"divisible_by": 8}, 32, True),
        ({"not_divisible_by": 8}, 30, True),
        ({"divides": 64}, 16, True),
        ({"has": ["a", "b"]}, frozenset({"b", "c"}), True),
        ({"has": ["a"]}, frozenset({"b"}), False),
        ({"has_all": ["a", "b"]}, frozenset({"a", "b", "c"}), True),
        ({"has_all": ["a", "d"]}, frozenset({"a", "b"}), False),
        ({"lacks": ["a"]}, frozenset({"b"}), True),
        ({"version": ">=1.3"}, "1.3.0", True),
        ({"version": "<0.33"}, "0.33.0", False),
        ({"version": "==0.11.*"}, "0.11.2", True),
        ({"set": True}, 0, True),
        ({"on": True}, True, True),
        ({"on": False}, False, True),
        (["x", "y"], "y", True),
        ("x", "x", True),
        (False, False, True),
    ],
)
def test_operators(question, value, verdict):
    assert decide({"serve": {"thing": question}}, serve={"thing": value}) is verdict


def test_every_operator_is_tested_above():
    tested = {row[0] for row in [*OPERATORS.items()]}
    mark = next(mark for mark in test_operators.pytestmark if mark.name == "parametrize")
    assert tested <= {key for question, *_ in mark.args[1] if isinstance(question, dict) for key in question}


@pytest.mark.parametrize("question", [{"is": 4}, {"lt": 5}, {"version": ">1"}, {"has": ["a"]}, {"not_in": [1]}])
def test_unknown_value_is_unknown(question):
    assert decide({"serve": {"thing": question}}, serve={}) is None
    assert decide({"not": {"serve": {"thing": question}}}, serve={}) is None


def test_only_set_and_on_know_the_unknown():
    assert decide({"serve": {"thing": {"set": False}}}, serve={}) is True
    assert decide({"serve": {"thing": {"on": False}}}, serve={}) is True
    assert decide({"serve": {"thing": {"on": True}}}, serve={}) is False


def test_value_of_another_type_is_unknown():
    assert decide({"serve": {"thing": {"lt": 5}}}, serve={"thing": "max"}) is None
    assert decide({"serve": {"thing": {"version": ">1"}}}, serve={"thing": "latest"}) is None
    assert decide({"serve": {"thing": {"divisible_by": 0}}}, serve={"thing": 5}) is None


def test_reference_to_another_field():
    table = {"final": {"heads": {"not_divisible_by": "$serve.degree"}}}
    assert decide(table, final={"heads": 40}, serve={"degree": 16}) is True
    assert decide(table, final={"heads": 48}, serve={"degree": 16}) is False
    assert decide(table, final={"heads": 48}, serve={}) is None
    assert fields(parse(table)) == {"final.heads", "serve.degree"}


def test_empty_condition_is_refused():
    with pytest.raises(ValueError, match="empty condition"):
        parse({})


def test_lookup_of_what_is_not_a_table():
    assert lookup({"serve": {"engine": "vllm"}}, "serve.engine.name") is None


def test_description_in_words():
    table = {"not": {"any": [{"serve": {"engine": "vllm"}}, {"serve": {"batch": {"gt": 1}}}]}}
    assert describe(parse(table)) == ["not ((serve.engine is vllm) or (serve.batch gt 1))"]


LEAVES = st.sampled_from(["a", "b", "c", "d"]).map(lambda name: {"serve": {name: True}})
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda part: {"not": part}),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"all": parts}),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"any": parts}),
    ),
    max_leaves=8,
)
VALUES = st.dictionaries(st.sampled_from("abcd"), st.booleans())


def plain(table, values):
    """Decide a tree in two values, given every leaf."""
    ((key, inner),) = table.items()
    if key == "not":
        return not plain(inner, values)
    if key in {"all", "any"}:
        return (all if key == "all" else any)(plain(part, values) for part in inner)
    return values[next(iter(inner))] is True


@given(TREES, VALUES)
def test_unknown_means_that_the_answer_may_still_change(table, known):
    """With every leaf known it is two-valued logic; a verdict despite unknowns holds however they turn out."""
    verdict = decide(table, serve=known)
    if known.keys() == set("abcd"):
        assert verdict is plain(table, known)
    if verdict is not None:
        for rest in ({}, dict.fromkeys("abcd", True), dict.fromkeys("abcd", False)):
            full = {**dict.fromkeys("abcd", False), **rest, **known}
            assert plain(table, full) is verdict
