"""INT8 rounding and SmoothQuant's search against element-by-element arithmetic and against no smoothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optikit.algorithms import int8, smoothquant


@given(
    rows=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3).filter(lambda r: max(map(abs, r)) > 1e-3),
        min_size=1,
        max_size=5,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rounding_errs_by_half_a_step_at_most_and_keeps_zero(rows, dtype):
    weight = torch.tensor(rows)
    scales = int8.scales_of(weight, dtype)
    codes = int8.quantize(weight, scales)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= 127
    back = int8.dequantize(codes, scales)
    # A scale rounded down to bfloat16 clips the extreme by up to 127 · 2^-9 of a step.
    assert ((back - weight).abs() <= scales.float() * (0.501 if dtype == torch.float32 else 0.75)).all()
    assert (back[weight == 0] == 0).all()


def test_a_row_of_zeros_stays_zero():
    scales = int8.scales_of(torch.zeros(2, 4))
    assert (scales > 0).all()
    assert torch.equal(int8.round_trip(torch.zeros(2, 4)), torch.zeros(2, 4))


def problem(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 32, generator=draw)
    inputs = torch.randn(300, 32, generator=draw)
    inputs[:, torch.randperm(32, generator=draw)[:2]] *= 40
    return weight, inputs


def slow_error(weight: Tensor, inputs: Tensor, scale: Tensor) -> float:
    """What the outputs really lose, token by token and row by row, as an INT8 kernel computes them."""
    total = 0.0
    rows = [(row * scale) for row in weight]
    rounded = [(torch.round(row / (row.abs().max() / 127)), row.abs().max() / 127) for row in rows]
    for token in inputs:
        x = token / scale
        step = x.abs().max() / 127
        codes = torch.round(x / step)
        for row, (row_codes, row_step) in zip(weight, rounded, strict=True):
            total += float((codes @ row_codes) * step * row_step - token @ row) ** 2
    return total


@pytest.mark.parametrize("seed", range(2))
def test_estimated_error_is_the_real_one_and_smoothing_lowers_it(seed):
    weight, inputs = problem(seed)
    found = smoothquant.search(weight, inputs.T @ inputs, inputs.abs().amax(0), inputs[::2], len(inputs))
    assert found.alpha is not None
    plain, smooth = slow_error(weight, inputs, torch.ones(32)), slow_error(weight, inputs, found.scale)
    assert found.plain_error == pytest.approx(plain, rel=0.15)
    assert found.error == pytest.approx(smooth, rel=0.15)
    assert smooth < 0.2 * plain


def test_scale_is_equation_4():
    scale = smoothquant.scale_of(torch.tensor([16.0, 1.0]), torch.tensor([4.0, 2.0]), 0.5)
    assert torch.allclose(scale, torch.tensor([2.0, 0.5**0.5]))


def test_no_smoothing_where_nothing_is_gained():
    weight = torch.eye(8)
    inputs = torch.ones(20, 8) * 127
    found = smoothquant.search(weight, inputs.T @ inputs, inputs.abs().amax(0), inputs, 20)
    assert found.alpha is None
    assert found.plain_error == 0
    assert torch.equal(found.scale, torch.ones(8))


def test_dead_channels_get_a_finite_scale():
    weight, inputs = problem(0)
    inputs[:, 3] = 0
    weight[:, 5] = 0
    found = smoothquant.search(weight, inputs.T @ inputs, inputs.abs().amax(0), inputs, 300)
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()


def test_tied_channels_share_a_scale():
    weight, inputs = problem(1)
    ties = torch.arange(32) // 2
    found = smoothquant.search(weight, inputs.T @ inputs, inputs.abs().amax(0), inputs, 300, ties=ties)
    assert found.alpha is not None
    assert torch.equal(found.scale[::2], found.scale[1::2])
    assert smoothquant.tie(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1, 0, 1])).tolist() == [2.0, 3.0, 2.0]
