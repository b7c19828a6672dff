"""Figures of speculation in the words of the field; what isn't what it should be is told as it stands."""

from pathlib import Path

import pytest

from optikit.report import speculation_table, write

EXAMPLES = Path(__file__).parents[2] / "examples"
FOUND = {
    "method": "medusa",
    "lengths": {"2": 3, "10": 12},
    "speedup": {"value": 1.85, "ci95": [1.5, 2.67]},
    "predicted_speedup": 1.9,
    "speedup_without_loops": None,
    "acceptance_by_position": [0.5, 0.25],
    "by_drafter": {"ngram": {"steps": 39, "drafted": 64, "accepted": 16}},
    "drafting_ms": {"ask": 0.99, "per_token": 0.0},
    "window_ms": {"1": 4.0, "2": 5.5},
    "latency_ms": {"plain": {"p50": 300.0, "p90": 410.0}},
    "by_prompt": [{"acceptance_length": 2.0, "speedup": 1.5}, {"acceptance_length": 3.0, "speedup": 2.5}],
}


def test_names_and_units():
    told = dict(speculation_table.listed(FOUND, drawn=False))
    assert told == {
        "method asked for": "Medusa heads",
        "prompt lookup: tokens drafted after a match": "12 after 10 tokens, 3 after 2 tokens",
        "speed-up on all answers, measured": "1.85× (1.50–2.67×)",
        "speed-up on all answers, predicted": "1.90×",
        "speed-up on answers that don't repeat themselves": "–",
        "acceptance rate by draft position": "50.0 %, 25.0 %",
        "acceptance rate: n-grams of earlier answers": "25.0 %, 16 of 64 draft tokens in 39 steps",
        "cost of heads or draft model": "0.990 ms per draft and 0 ms per token of it",
        "verification cost T(m): time of a forward pass of m tokens": "1: 4.00 ms, 2: 5.50 ms",
        "time per answer: plain": "300 ms median, 410 ms at the 90th percentile",
        "speed-up by prompt": "the best 2.50× at an acceptance length of 3.00",
    }


def test_pictures_are_not_told_again():
    names = {name for name, _ in speculation_table.listed(FOUND, drawn=True)}
    assert len(names) == len(FOUND) - 3
    assert not any("T(m)" in name or "position" in name or "by prompt" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"explained_ties": 3, "unexplained": 0},
            "1.90× was predicted; texts part from plain decoding at near-ties only.",
        ),
        ({"explained_ties": 0, "unexplained": 0}, "every text is that of plain decoding."),
        ({"explained_ties": 3, "unexplained": 2}, "2 texts part from plain decoding, and nothing explains it."),
        ({"chosen": "off"}, "no drafter pays"),
        ({"explained_ties": 0, "unexplained": "x"}, None),
        ({"speedup": None}, None),
    ],
)
def test_one_sentence_says_what_it_brought(changes, said):
    found = speculation_table.sentence({**FOUND, **changes})
    assert found == "" if said is None else said in found


def test_every_figure_is_in_one_group_only():
    keys = [key for group in speculation_table.GROUPS.values() for key in group]
    assert len(keys) == len(set(keys)) == len(speculation_table.WORDS)
    (further,) = [
        rows for title, rows in speculation_table.grouped({**FOUND, "new": 3}, drawn=True) if "Further" in title
    ]
    assert further == (("new", "3"),)


@pytest.mark.parametrize("nonsense", ["words", 3, [1], {"a": "b"}, True, float("nan"), [["x"]], {"value": {}}])
def test_nonsense_is_told_as_it_stands(nonsense):
    for key in (*speculation_table.WORDS, "other"):
        rows = speculation_table.listed({key: nonsense}, drawn=False)
        assert all(isinstance(part, str) for row in rows for part in row)


@pytest.mark.parametrize("name", ["smollm2-135m-gptq-medusa-cpu", "smollm2-135m-lookup-cpu"])
def test_every_figure_of_a_recorded_run_has_a_name(name):
    found = write.load(EXAMPLES / name).speculation
    assert set(found) <= set(speculation_table.WORDS)
