"""Perplexity against a slow reference, against transformers' own loss, and at its edges."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.evaluation import perplexity as p


def slow_nll(row, target):
    """-log softmax in 28 decimal digits."""
    total = sum(Decimal(float(x)).exp() for x in row)
    return float(-(Decimal(float(row[target])).exp() / total).ln())


@given(st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=9), st.data())
def test_token_nll_against_a_slow_reference(row, data):
    target = data.draw(st.integers(0, len(row) - 1))
    logits = np.array([row], np.float32)
    assert p.token_nll(logits, np.array([target]))[0] == pytest.approx(
        slow_nll(logits[0], target), rel=1e-12, abs=1e-12
    )


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    nll = p.token_nll(np.zeros((7, 50), np.float32), np.arange(7))
    assert p.perplexity(nll) == pytest.approx(50)


def test_large_logits_neither_overflow_nor_lose_the_target():
    logits = np.array([[3e38, -3e38, 0], [1000, 1001, -1000]], np.float32)
    assert p.token_nll(logits, np.array([0, 1])) == pytest.approx([0, math.log(1 + math.exp(-1))])


def test_nan_in_nan_out():
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = np.nan
    assert list(np.isnan(p.token_nll(logits, np.zeros(3, np.int64)))) == [False, True, False]


def test_a_hopeless_model_has_infinite_perplexity_not_an_error():
    assert p.perplexity(np.array([5000.0])) == math.inf


def test_bits_per_byte_of_a_coin():
    """Two equally likely bytes cost one bit each."""
    assert p.bits_per_byte(np.full(10, math.log(2)), 10) == pytest.approx(1)


def test_perplexity_per_word_counts_words():
    assert p.perplexity(np.full(6, math.log(2)), 3) == pytest.approx(4)
    assert p.perplexity(np.full(6, 500.0), 3) == math.inf


def test_perplexity_is_that_of_transformers_own_loss(tiny_llama):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    windows = np.random.default_rng(0).integers(3, 259, (4, 64))
    tokens = torch.from_numpy(windows)
    with torch.no_grad():
        expected = math.exp(float(model(tokens, labels=tokens).loss))
        logits = model(tokens).logits.numpy()
    nll = np.stack([p.token_nll(each[:-1], window[1:]) for each, window in zip(logits, windows, strict=True)])
    assert p.perplexity(nll) == pytest.approx(expected, rel=1e-4)
    assert nll.shape == (4, 63)
