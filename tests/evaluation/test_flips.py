"""Flips, their significance over several tasks, and output lengths: hand-made cases, exact enumeration, simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from optikit.evaluation import flips as f


def made(lost, won, same, items):
    """`items` items, of which `same` are right in both models."""
    baseline = np.array([True] * lost + [False] * won + [True] * same + [False] * (items - lost - won - same))
    candidate = np.array([False] * lost + [True] * won + [True] * same + [False] * (items - lost - won - same))
    return baseline, candidate


def test_equal_accuracy_hides_flips():
    found = f.compare(*made(lost=30, won=30, same=100, items=200))
    assert found.baseline == found.candidate == 0.65
    assert (found.change, found.flip_rate) == (0, 0.3)
    assert found.p_worse > 0.5
    assert found.changed_answers is None


def test_the_example_of_the_framework():
    found = f.compare(*made(lost=40, won=22, same=300, items=1000))
    assert round(found.p_worse, 4) == 0.0150
    assert found.change == pytest.approx(-0.018)
    low, high = found.change_ci95
    assert low < -0.018 < high < 0.001
    assert round(found.detectable, 3) == 0.022


def test_an_answer_can_change_without_a_flip():
    wrong = np.array([False, False, True])
    found = f.compare(wrong, wrong, answers=([0, 1, 2], [3, 1, 2]))
    assert (found.flip_rate, found.changed_answers) == (0, 1 / 3)
    assert (found.p_worse, found.detectable > 0) == (1, True)


def test_items_must_be_the_same():
    with pytest.raises(ValueError, match="different items"):
        f.compare(np.ones(3, bool), np.ones(4, bool))


def test_the_permutation_test_against_every_permutation():
    tasks = [f.compare(*made(3, 1, 2, 10)), f.compare(*made(2, 2, 5, 20))]
    observed = sum((task.lost - task.won) / task.items for task in tasks)
    signs = list(itertools.product((1, -1), repeat=8))
    reached = sum(sum(s[:4]) / 10 + sum(s[4:]) / 20 >= observed - 1e-12 for s in signs)
    assert f.permutation(tasks) == pytest.approx(reached / len(signs), abs=0.006)


def simulated(draw, drop, tasks=4, items=500, flip=0.06):
    """Tasks on which a candidate flips 6 % of the items, more of them lost by `drop`."""
    found = {}
    for index in range(tasks):
        flips = draw.random(items) < flip
        losing = draw.random(items) < 0.5 + drop / (2 * flip)
        baseline = np.where(flips, losing, draw.random(items) < 0.5)
        candidate = np.where(flips, ~losing, baseline)
        found[f"task-{index}"] = f.compare(baseline, candidate)
    return found


def test_no_loss_is_called_one_in_at_most_5_percent(monkeypatch):
    monkeypatch.setattr(f.statistics, "REPETITIONS", 10)
    monkeypatch.setattr(f, "REPETITIONS", 2000)
    draw = np.random.default_rng(0)
    alarms = sum(f.over_tasks(simulated(draw, 0.0)).conclusion == "worse" for _ in range(400))
    assert alarms / 400 <= 0.06


def test_a_loss_of_3_points_on_four_tasks_is_found(monkeypatch):
    monkeypatch.setattr(f.statistics, "REPETITIONS", 10)
    monkeypatch.setattr(f, "REPETITIONS", 2000)
    draw = np.random.default_rng(1)
    found = sum(f.over_tasks(simulated(draw, 0.03)).conclusion == "worse" for _ in range(100))
    assert found >= 95


def test_a_single_bad_task_is_named():
    tasks = {name: f.compare(*made(10, 10, 50, 200)) for name in "abc"} | {"sql": f.compare(*made(40, 5, 50, 200))}
    verdict = f.over_tasks(tasks)
    assert verdict.worse == ("sql",)
    assert verdict.conclusion == "worse"
    assert verdict.p_by_task["sql"] < 1e-4 < verdict.p_by_task["a"]


def test_length_ratio_and_its_interval():
    draw = np.random.default_rng(0)
    lengths = draw.integers(20, 200, 60)
    shorter = np.maximum(1, (lengths * 0.8 + draw.normal(0, 5, 60)).astype(int))
    ratio, (low, high) = f.length_ratio(lengths.tolist(), shorter.tolist())
    assert ratio == pytest.approx(shorter.sum() / lengths.sum())
    assert low < ratio < high < 0.9
    draws = [draw.integers(0, 60, 60) for _ in range(4000)]
    slow = np.quantile([shorter[each].sum() / lengths[each].sum() for each in draws], [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(slow), abs=0.004)
    with pytest.raises(ValueError, match="can't be compared"):
        f.length_ratio([0, 0], [1, 2])
