"""Statistics against scipy's, wherever scipy has the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from optikit.evaluation import speed
from optikit.evaluation import statistics as s

stats = pytest.importorskip("scipy.stats", reason="scipy is part of the extra `dev`")

COUNTS = st.integers(0, 400)
SHARES = st.floats(0.001, 0.999)
SAMPLES = arrays(np.float64, st.integers(2, 7), elements=st.floats(-1e3, 1e3))


@given(COUNTS, COUNTS)
def test_mcnemar_is_the_exact_binomial_test(lost, won):
    if lost + won:
        reference = stats.binomtest(lost, lost + won, 0.5, alternative="greater").pvalue
        assert s.mcnemar(lost, won) == pytest.approx(reference, rel=1e-9, abs=1e-300)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_bounds_what_benjamini_and_hochberg_find(p_values):
    """scipy has no Holm; both adjust the same ordered p-values, and the control of every error is the stricter."""
    assert (np.array(s.holm(p_values)) >= stats.false_discovery_control(p_values, method="bh") - 1e-12).all()


@given(st.floats(-50, 50), st.integers(1, 400))
def test_student_distribution(t, freedom):
    assert s.student_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-9)


@given(st.floats(0.01, 0.99), st.integers(1, 1000))
def test_student_quantiles(p, freedom):
    assert s.student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-7, abs=1e-7)


@given(st.floats(0.9, 0.9999), st.integers(1001, 10**6))
def test_many_degrees_of_freedom_are_the_normal_distribution(p, freedom):
    assert s.student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=5e-3)


@given(st.integers(1, 5000).flatmap(lambda items: st.tuples(st.integers(0, items), st.just(items))))
def test_a_share_has_wilsons_interval(right_of_items):
    right, items = right_of_items
    reference = stats.binomtest(right, items).proportion_ci(0.95, method="wilson")
    assert s.share_interval(right, items) == pytest.approx((reference.low, reference.high), abs=1e-9)


@given(SHARES, st.integers(0, 5), st.floats(0.5, 0.999))
@settings(max_examples=50)
def test_requests_needed_are_the_first_that_the_binomial_tail_allows(percentile, over_limit, confidence):
    if percentile > 0.99:
        return  # thousands of requests, counted one by one
    needed = s.requests_needed(percentile, over_limit=over_limit, confidence=confidence)
    tails = stats.binom.cdf(over_limit, [needed - 1, needed], 1 - percentile)
    assert tails[1] <= 1 - confidence + 1e-9
    assert tails[0] > 1 - confidence - 1e-9 or needed == over_limit + 1


@given(SAMPLES)
def test_few_blocks_have_students_interval(values):
    if values.std() > 1e-6:
        error = stats.sem(values)
        low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=error)
        assert s.mean_interval(values) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


@given(st.integers(10, 5000), st.floats(0.001, 1), st.floats(0.001, 0.2), st.floats(0.5, 0.99))
def test_detectable_flips_have_the_power_that_they_claim(items, rate, alpha, power):
    """The normal test of a change of that size, two-sided, finds it with the power asked for."""
    shift = s.detectable_flips(items, rate, alpha=alpha, power=power) / math.sqrt(rate / items)
    assert stats.norm.sf(stats.norm.isf(alpha / 2) - shift) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize(
    ("samples", "statistic", "ours"), [(40, np.mean, s.mean_interval), (41, np.median, s.median_interval)]
)
def test_the_bootstrap_is_scipys_with_its_percentiles_moved_outward(samples, statistic, ours):
    values = np.random.default_rng(5).gamma(2, 1, samples)

    def reference(level):
        draw = np.random.default_rng(6)
        return stats.bootstrap(
            (values,), statistic, n_resamples=20_000, confidence_level=level, method="percentile", rng=draw
        ).confidence_interval

    reach = math.sqrt(samples / (samples - 1)) * stats.t.ppf(0.975, samples - 1)
    level = 1 - 2 * stats.norm.sf(reach)
    inner, outer = reference(level - 0.008), reference(level + 0.008)  # 2.5 Monte Carlo errors of either tail
    low, high = ours(values)
    assert outer.low <= low <= inner.low
    assert inner.high <= high <= outer.high
    assert level > 0.955  # farther out than percentiles as they are


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(8, 60), st.floats(0.1, 3))
def test_the_bootstrap_of_a_mean_agrees_with_students_interval_where_the_normal_distribution_holds(
    seed, blocks, spread
):
    values = np.random.default_rng(seed).normal(5, spread, blocks)
    low, high = s.mean_interval(values, seed=seed)
    reference = stats.t.interval(0.95, blocks - 1, loc=values.mean(), scale=stats.sem(values))
    assert (high - low) / (reference[1] - reference[0]) == pytest.approx(1, abs=0.2)


def test_paired_changes_have_walds_interval_with_half_an_item_more():
    """Agresti and Min: a pseudo-item of +1, −1 (half each) and agreement (one) in a plain normal interval."""
    lost, won, items = 7, 3, 120
    changes = np.repeat([-1.0, 1.0, 0.0], [2 * lost + 1, 2 * won + 1, 2 * (items + 1 - lost - won)])  # halves, doubled
    error = changes.std() / math.sqrt(items + 2)
    reference = stats.norm.interval(0.95, loc=changes.mean(), scale=error)
    assert s.paired_change_interval(lost, won, items) == pytest.approx(reference)


@given(arrays(np.float64, st.integers(1, 400), elements=st.floats(0, 1e4)), st.sampled_from([0.5, 0.9, 0.95]))
def test_a_tail_is_told_where_enough_requests_support_it(values, percentile):
    told = speed.tail(values, percentile)
    assert (told is None) == (len(values) < s.requests_needed(percentile))
    if told is not None:
        assert told == pytest.approx(stats.scoreatpercentile(values, 100 * percentile))
