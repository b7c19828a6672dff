"""Divergence against a slow reference, its statistics against llama.cpp's formulas, and the kept logits."""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from optikit.evaluation import divergence as d
from optikit.evaluation import perplexity as p

ROWS = arrays.arrays(np.float32, (2, 7), elements=st.floats(-50, 50, width=32))


def slow_divergence(base, other):
    """Σ p (ln p - ln q) in 28 decimal digits."""
    base, other = ([Decimal(float(x)).exp() for x in row] for row in (base, other))
    p_total, q_total = sum(base), sum(other)
    return float(sum(a / p_total * ((a / p_total).ln() - (b / q_total).ln()) for a, b in zip(base, other, strict=True)))


@given(ROWS, ROWS)
def test_divergence_against_a_slow_reference(base, other):
    kept = d.keep(base)
    expected = [slow_divergence(a, b) for a, b in zip(kept, other, strict=True)]
    assert d.token_divergence(kept, other) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(ROWS)
def test_a_model_hardly_diverges_from_its_own_kept_logits(logits):
    divergence = d.token_divergence(d.keep(logits), logits)
    assert np.all(divergence < 1e-5)
    assert np.all(divergence > -1e-12)


@pytest.mark.parametrize("scale", [0.5, 2, 5, 12])
def test_over_a_large_vocabulary_the_kept_logits_cost_less_than_a_millionth(scale):
    logits = (np.random.default_rng(0).normal(size=(32, 50_000)) * scale).astype(np.float32)
    assert d.token_divergence(d.keep(logits), logits).max() < 1e-6


def test_kept_logits_that_underflow_weigh_nothing():
    logits = np.array([[0, -1e6, -3e38]], np.float32)
    assert d.keep(logits)[0].tolist() == [0, d.LOWEST, d.LOWEST]
    assert d.token_divergence(d.keep(logits), logits)[0] == pytest.approx(0)


def test_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match="different vocabularies"):
        d.token_divergence(np.zeros((2, 5), np.float16), np.zeros((2, 6), np.float32))


def statistics_of_a_toy(n=400, vocab=11):
    draw = np.random.default_rng(5)
    base = draw.normal(size=(n, vocab)).astype(np.float32) * 3
    other = base + draw.normal(size=(n, vocab)).astype(np.float32) * 0.3
    targets = draw.integers(0, vocab, n)
    rows = [p.token_nll(each, targets) for each in (base, other)]
    same = base.argmax(axis=1) == other.argmax(axis=1)
    return d.token_divergence(d.keep(base), other), rows[0], rows[1], same


def test_statistics_are_those_of_llama_cpp():
    """Written as tools/perplexity/perplexity.cpp writes them: running sums, independent tokens."""
    divergence, base, other, same = statistics_of_a_toy()
    found = d.statistics(divergence, base, other, same)
    n = len(divergence)

    def mean_and_error(values):
        total, squares = sum(values), sum(x * x for x in values)
        mean = total / n
        return mean, math.sqrt((squares / n - mean * mean) / (n - 1))

    assert (found.mean, found.mean_se) == pytest.approx(mean_and_error(divergence.tolist()))
    errors = [mean_and_error(values.tolist())[1] for values in (base, other)]
    covariance = ((base * other).mean() - base.mean() * other.mean()) / (n - 1)
    log_ratio = other.mean() - base.mean()
    log_ratio_error = math.sqrt(errors[0] ** 2 + errors[1] ** 2 - 2 * covariance)
    assert found.ratio == pytest.approx(math.exp(log_ratio))
    assert found.ratio_se == pytest.approx(math.exp(log_ratio) * log_ratio_error)
    assert found.correlation == pytest.approx(covariance / errors[0] / errors[1])
    change = [math.exp(-q) - math.exp(-r) for q, r in zip(other, base, strict=True)]
    assert (found.dp_mean, found.dp_mean_se) == pytest.approx(mean_and_error(change))
    assert found.dp_rms == pytest.approx(math.sqrt(sum(x * x for x in change) / n))
    agreement = sum(same) / n
    assert found.top1 == agreement
    assert found.top1_se == pytest.approx(math.sqrt(agreement * (1 - agreement) / (n - 1)))
    ordered = sorted(divergence)
    assert (found.min, found.max) == (ordered[0], ordered[-1])
    assert found.median == pytest.approx((ordered[n // 2 - 1] + ordered[n // 2]) / 2)
    assert ordered[int(0.99 * n) - 1] <= found.percentiles["p99"] <= ordered[int(0.99 * n) + 1]


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="99 tokens are too few"):
        d.statistics(*(values[:99] for values in statistics_of_a_toy()))
    divergence, base, other, same = statistics_of_a_toy()
    with pytest.raises(ValueError, match="different lengths"):
        d.statistics(divergence, base[1:], other, same)


def test_models_that_are_sure_of_everything_have_no_correlation():
    flat = np.zeros(200)
    assert d.statistics(flat, flat, flat, flat == 0).correlation is None


@given(arrays.arrays(np.float64, st.integers(1, 50), elements=st.floats(-1e-13, 40)))
def test_the_histogram_holds_every_token(values):
    bins = d.histogram(values)
    assert sum(count for _, _, count in bins) == len(values)
    assert all(a[1] == b[0] for a, b in pairwise(bins))
