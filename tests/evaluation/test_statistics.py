"""Statistics against exact values, slow references and simulations of false alarms and of power."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.evaluation import statistics as s

TRIALS = 400
"""A true rate of 5 % shows up as more than 8 % in fewer than 1 of 200 such simulations."""


def test_mcnemar_is_the_tail_of_a_fair_coin():
    assert round(s.mcnemar(40, 22), 4) == 0.0150
    assert s.mcnemar(0, 0) == 1
    assert s.mcnemar(3, 0) == 1 / 8


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_counts_all_outcomes(lost, won):
    outcomes = itertools.product((0, 1), repeat=lost + won) if lost + won <= 10 else None
    if outcomes is None:
        return
    tosses = list(outcomes)
    assert s.mcnemar(lost, won) == pytest.approx(sum(sum(toss) >= lost for toss in tosses) / len(tosses))


def test_mcnemar_survives_many_items():
    assert 0.49 < s.mcnemar(5000, 5000) < 0.52


def test_holm_orders_scales_and_caps():
    assert s.holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert s.holm([0.9, 0.8]) == (1.0, 1.0)
    assert s.holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_against_its_definition(p_values):
    adjusted = s.holm(p_values)
    order = sorted(range(len(p_values)), key=lambda i: (p_values[i], i))
    for rank, index in enumerate(order):
        steps = [(len(p_values) - r) * p_values[order[r]] for r in range(rank + 1)]
        assert adjusted[index] == pytest.approx(min(1.0, max(steps)))


def test_student_quantiles_match_the_tables():
    for freedom, value in ((1, 12.7062), (2, 4.3027), (7, 2.3646), (15, 2.1314), (100, 1.9840)):
        assert s.student_quantile(0.975, freedom) == pytest.approx(value, abs=1e-4)
    assert s.student_quantile(0.975, 5000) == pytest.approx(1.96, abs=1e-3)


@given(st.floats(-8, 8), st.integers(1, 60))
def test_student_distribution_is_the_integral_of_its_density(t, freedom):
    norm = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    grid = np.linspace(0, abs(t), 4001)
    density = norm * (1 + grid**2 / freedom) ** (-(freedom + 1) / 2)
    half = np.trapezoid(density, grid)
    assert s.student_cdf(t, freedom) == pytest.approx(0.5 + math.copysign(half, t), abs=1e-6)


def test_requests_needed_are_those_of_mlperf():
    table = {0.90: (44, 64, 81, 97), 0.95: (90, 130, 165, 198), 0.99: (459, 662, 838, 1001)}
    for percentile, needed in table.items():
        assert tuple(s.requests_needed(percentile, over_limit=t) for t in range(4)) == needed
    assert s.requests_needed(0.99, confidence=0.95) == 299
    with pytest.raises(ValueError, match="between 0 and 1"):
        s.requests_needed(99)


def test_detectable_flips_are_those_of_the_paper():
    points = [100 * s.detectable_flips(items, rate) for rate in (0.05, 0.10) for items in (200, 1000, 5000)]
    assert [round(point, 1) for point in points] == [4.4, 2.0, 0.9, 6.3, 2.8, 1.3]


def test_mean_interval_against_a_slow_bootstrap():
    values = np.random.default_rng(3).gamma(2, 1, 12)
    draw = np.random.default_rng(4)
    means = sorted(np.mean(draw.choice(values, len(values))) for _ in range(20_000))
    reach = math.sqrt(12 / 11) * s.student_quantile(0.975, 11)
    tail = 0.5 * math.erfc(reach / math.sqrt(2))
    expected = means[int(tail * 20_000)], means[int((1 - tail) * 20_000)]
    assert s.mean_interval(values) == pytest.approx(expected, rel=0.02)


def test_intervals_are_reproducible_and_seeded():
    values = np.random.default_rng(0).normal(size=20)
    assert s.mean_interval(values, seed=1) == s.mean_interval(values, seed=1)
    assert s.mean_interval(values, seed=1) != s.mean_interval(values, seed=2)
    assert s.median_interval(values, seed=1) == s.median_interval(values, seed=1)


def test_many_blocks_stay_within_memory(monkeypatch):
    import tracemalloc

    monkeypatch.setattr(s, "REPETITIONS", 1000)
    values = np.random.default_rng(0).normal(size=20_000)
    tracemalloc.start()
    s.mean_interval(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


def test_one_value_has_no_interval():
    for function in (s.mean_interval, s.median_interval):
        with pytest.raises(ValueError, match="at least two"):
            function(np.array([1.0]))


def test_identical_models_have_ratio_one_exactly():
    nll = np.random.default_rng(0).gamma(2, 1, (16, 50))
    assert s.perplexity_ratio(nll, nll) == (1.0, (1.0, 1.0))


def test_windows_must_be_the_same():
    with pytest.raises(ValueError, match="different windows"):
        s.perplexity_ratio(np.ones((4, 10)), np.ones((4, 11)))


def planted_nll(draw, windows, shift):
    """Correlated tokens: each window has its own difficulty, and its own reaction to the change."""
    baseline = draw.gamma(2, 1, (windows, 30)) + draw.normal(0, 0.5, (windows, 1))
    reaction = draw.normal(shift, 0.02, (windows, 1))
    return baseline, baseline + reaction + draw.normal(0, 0.05, (windows, 30))


@pytest.mark.parametrize("windows", [4, 16, 40])
def test_perplexity_ratio_raises_false_alarms_in_at_most_5_percent(windows, monkeypatch):
    monkeypatch.setattr(s, "REPETITIONS", 500)
    draw = np.random.default_rng(windows)
    alarms = 0
    for _ in range(TRIALS):
        low, high = s.perplexity_ratio(*planted_nll(draw, windows, 0.0))[1]
        alarms += not low <= 1 <= high
    assert alarms / TRIALS <= 0.08


def test_a_token_wise_interval_would_raise_many():
    """The reason for blocks: standard errors over tokens, as if independent, call noise a loss most of the time."""
    draw = np.random.default_rng(0)
    alarms = 0
    for _ in range(TRIALS):
        baseline, candidate = planted_nll(draw, 16, 0.0)
        difference = (candidate - baseline).ravel()
        alarms += abs(difference.mean()) > 1.96 * difference.std() / math.sqrt(difference.size)
    assert alarms / TRIALS > 0.15


def test_a_planted_loss_of_2_percent_is_found_with_the_power_promised():
    draw = np.random.default_rng(1)
    shifts = [s.detectable_shift((b - a).mean(axis=1)) for a, b in (planted_nll(draw, 40, 0.0) for _ in range(50))]
    shift = float(np.mean(shifts))
    assert 0.005 < shift < 0.015
    found = sum(s.perplexity_ratio(*planted_nll(draw, 40, shift))[1][0] > 1 for _ in range(TRIALS))
    assert 0.72 <= found / TRIALS <= 0.92


def times(draw, pairs, kind, slower=1.0):
    """Milliseconds of a noisy machine: jitter, bursts of other people's work, slow drift, or two speeds of minutes."""
    if kind == "two speeds":
        pace = np.repeat(draw.choice([1.0, 2.0], (pairs + 3) // 4), 4)[:pairs]
    elif kind == "drift":
        pace = np.exp(np.cumsum(draw.normal(0, 0.03, pairs)))
    else:
        pace = np.ones(pairs)
    jitter = np.exp(draw.normal(0, 0.01, (2, pairs)))
    if kind == "bursts":
        jitter += (draw.random((2, pairs)) < 0.15) * draw.exponential(0.3, (2, pairs))
    return 40 * pace * jitter[0], 40 * slower * pace * jitter[1]


@pytest.mark.parametrize("kind", ["jitter", "bursts", "drift", "two speeds"])
@pytest.mark.parametrize("pairs", [4, 8, 16])
def test_speed_of_identical_arms_is_no_measurable_change(kind, pairs, monkeypatch):
    monkeypatch.setattr(s, "REPETITIONS", 500)
    draw = np.random.default_rng(pairs)
    alarms = 0
    for _ in range(TRIALS):
        floor = s.noise_floor(s.paired_ratio(*times(draw, pairs, kind))[1])
        value, interval = s.paired_ratio(*times(draw, pairs, kind))
        alarms += s.speed_change(value, interval, floor) != "no measurable change"
    assert alarms / TRIALS <= 0.05


@pytest.mark.parametrize("kind", ["jitter", "drift", "two speeds"])
def test_a_planted_slow_down_of_3_percent_is_found(kind, monkeypatch):
    monkeypatch.setattr(s, "REPETITIONS", 500)
    draw = np.random.default_rng(0)
    found = 0
    for _ in range(100):
        floor = s.noise_floor(s.paired_ratio(*times(draw, 20, kind))[1])
        value, interval = s.paired_ratio(*times(draw, 20, kind, slower=1.03))
        found += s.speed_change(value, interval, floor) == "slower"
    assert found >= 95


def test_paired_ratio_needs_positive_pairs():
    with pytest.raises(ValueError, match="not paired"):
        s.paired_ratio(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="positive"):
        s.paired_ratio(np.ones(8), np.zeros(8))


@given(st.floats(0.5, 2), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_change_is_named_only_outside_interval_and_noise(value, below, above, floor):
    change = s.speed_change(value, (value - below, value + above), floor)
    if change == "faster":
        assert value - below > 1
        assert value - 1 >= floor
    elif change == "slower":
        assert value + above < 1
        assert 1 - value >= floor
