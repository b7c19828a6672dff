"""Floors: against arithmetic done by hand, and against what can't be otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.runtime.speculation.tuning import speculation_speedup, tokens_per_step
from optikit.targets import Target, rows
from optikit.targets.estimate import (
    cache_bytes,
    decode_floor,
    floors,
    prefill_floor,
    prefill_operations,
    price_per_million,
    price_words,
    told,
)
from tests.shapes import llama2_7b

MODEL = llama2_7b()
BARE = Target(name="bare", device="cpu")


def test_decode_floor_by_hand():
    """13.48 GB of weights less 262 MB of looked-up embedding, plus 1.07 GB of cache, over 2.039 TB/s."""
    seconds = decode_floor(MODEL, rows()["a100-80"], batch=1, length=2048)
    read = 2 * MODEL.parameters - 2 * 32000 * 4096 + 2 * 32 * 32 * 128 * 2048 * 2
    assert seconds == pytest.approx(read / 2.039e12)
    assert 6.9e-3 < seconds < 7.1e-3


def test_decoding_many_sequences_is_bound_by_work():
    """512 sequences of one token on an L4: 6.6 B weights, two operations each, at 121 TFLOPS."""
    seconds = decode_floor(MODEL, rows()["l4"], batch=512, length=1)
    assert seconds == pytest.approx(2 * 512 * (MODEL.linear_elements + 32000 * 4096) / 121e12)


def test_floors_in_words():
    lines = told(floors(MODEL, rows()["t4"], batch=8, length=4096), rows()["t4"])
    assert lines[0] == "serving on t4, batch 8, 4096 tokens (floors by roofline, not measured)"
    assert lines[1] == "  memory   weights 13.48 GB + cache 17.18 GB of 17.2 GB: doesn't fit"
    assert lines[2].startswith("  decode   at least ")
    assert len(lines) == 4
    last = told(floors(MODEL, rows()["g5.xlarge"]), rows()["g5.xlarge"])[-1]
    assert last.startswith("  price    $")
    assert "per million output tokens at batch 8, 2048 tokens (" in last
    assert len(told(floors(MODEL, BARE), BARE)) == 2


def test_tied_embedding_is_read_through():
    tied = replace(MODEL, tied=True)
    target = rows()["l4"]
    assert decode_floor(tied, target) > decode_floor(MODEL, target)


def test_prefill_operations_by_hand():
    """Two per weight and token, four per head element and pair of positions, the head once."""
    tokens = 3
    attention = 4 * 32 * 32 * 128 * (1 + 2 + 3)
    expected = 2 * MODEL.linear_elements * tokens + attention + 2 * 32000 * 4096
    assert prefill_operations(MODEL, batch=1, length=tokens) == expected


def test_sliding_window_bounds_cache_and_attention():
    window = replace(MODEL, sliding_window=100)
    assert cache_bytes(window, batch=2, length=500) == MODEL.kv_cache_bytes(100, batch=2)
    seen = sum(min(position, 100) for position in range(1, 501))
    linear = 2 * MODEL.linear_elements * 500 + 2 * 32000 * 4096
    assert prefill_operations(window, batch=1, length=500) == linear + 4 * 32 * 32 * 128 * seen


def test_int8_activations_run_at_the_int8_rate():
    target = rows()["a10g"]
    eight = replace(MODEL, traits=frozenset({"int8_w8a8"}))
    assert prefill_floor(MODEL, target) / prefill_floor(eight, target) == pytest.approx(2)


def test_turing_multiplies_in_fp16():
    assert prefill_floor(MODEL, rows()["t4"]) > 0


def test_more_accelerators_are_proportionally_faster():
    one, four = rows()["g5.xlarge"], rows()["g5.12xlarge"]
    assert decode_floor(MODEL, one) / decode_floor(MODEL, four) == pytest.approx(4)


def test_what_the_row_leaves_open_stays_open():
    found = floors(MODEL, BARE)
    assert (found.decode_seconds, found.prefill_seconds, found.usd_per_million_output_tokens) == (None, None, None)
    assert found.fits is None


def test_price_of_a_million_tokens_by_hand():
    target = rows()["ml.g5.xlarge"]
    found = floors(MODEL, target)
    rate = 8 / decode_floor(MODEL, target, batch=8, length=2048)
    assert found.usd_per_million_output_tokens == pytest.approx(1.408 / 3600 / rate * 1e6)
    assert found.price_source == rows()["ml.g5.xlarge"].price_source


@given(st.integers(1, 64), st.integers(1, 8192))
def test_a_stack_has_one_price_whatever_else_is_asked(batch, length):
    target = rows()["ml.g5.xlarge"]
    one, other = floors(MODEL, target), floors(MODEL, target, batch=batch, length=length)
    assert price_words(one) == price_words(other)
    assert "at least" not in price_words(one)


def test_no_more_sequences_are_priced_than_fit():
    """13.5 GB of weights and 1.07 GB of cache per sequence: 8 fit in 24 GiB, 2 in 16, 16 in four times 24."""
    found = {name: floors(MODEL, rows()[name]).priced_batch for name in ("g5.xlarge", "t4", "g5.12xlarge")}
    assert found == {"g5.xlarge": 8, "t4": 2, "g5.12xlarge": 16}
    assert floors(replace(MODEL, max_positions=100), rows()["t4"]).priced_length == 100


def test_fits():
    assert floors(MODEL, rows()["a10g"]).fits is True
    assert floors(MODEL, rows()["t4"], batch=8, length=4096).fits is False


@given(st.integers(1, 64), st.integers(1, 8192), st.integers(1, 64), st.integers(1, 8192))
def test_more_work_never_takes_less(batch, length, more_batch, more_length):
    target = rows()["h100"]
    small, large = {"batch": batch, "length": length}, {"batch": batch + more_batch, "length": length + more_length}
    assert decode_floor(MODEL, target, **small) < decode_floor(MODEL, target, **large)
    assert prefill_floor(MODEL, target, **small) < prefill_floor(MODEL, target, **large)


def test_nothing_decoded_costs_nothing_known():
    assert price_per_million(1.0, 0.0) is None
    assert price_per_million(1.0, None) is None


@pytest.mark.parametrize(
    ("alpha", "cost", "slope", "tokens", "speedup"),
    [(0.5, 0.05, 0.03, 3, 1.51), (0.7, 0.14, 0.1, 2, 1.48), (0.8, 0.05, 0.03, 6, 2.67), (0.8, 0.32, 0.1, 2, 1.33)],
)
def test_speculation_speedup_of_the_closed_form(alpha, cost, slope, tokens, speedup):
    """(1 - a^(k+1)) / (1 - a) tokens for k drafts and one verification of k + 1 tokens."""
    found = speculation_speedup([alpha] * tokens, draft_cost=cost, verify_cost=1 + slope * tokens)
    assert tokens_per_step([alpha] * tokens) == pytest.approx((1 - alpha ** (tokens + 1)) / (1 - alpha))
    assert found == pytest.approx(speedup, abs=0.006)
