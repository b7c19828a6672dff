"""FP4 against the slow and obvious way: every code of every weight tried, in fractions; scales against their rule."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optikit.algorithms import fp4
from optikit.formats.fp4 import dequantize, pack


def nearest(value: float, step: float) -> int:
    """Return the code whose value is nearest, the even one of two, by trying all of them exactly."""
    wanted = abs(Fraction(value)) / Fraction(step)
    distances = [abs(Fraction(level) - wanted) for level in fp4.LEVELS]
    best = [code for code, distance in enumerate(distances) if distance == min(distances)]
    return min(best, key=lambda code: code % 2) + 8 * (value < 0)


@given(st.lists(st.integers(-4096, 4096), min_size=16, max_size=16), st.sampled_from([0.125, 0.5, 1.0, 4.0]))
def test_codes_are_the_nearest_and_ties_go_to_even_ones(numbers: list[int], step: float) -> None:
    weight = torch.tensor([number / 64 for number in numbers])
    codes = fp4.quantize(weight, torch.tensor(step))
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [nearest(float(value), step) for value in weight]
    assert torch.equal(
        dequantize(pack(codes)[None], torch.full((1, 1), step))[0], fp4.dequantize(codes, torch.tensor(step))
    )


def random(rows: int = 8, columns: int = 96) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) * torch.logspace(-4, 1, rows)[:, None]
    weight[1, :32] = 0
    return weight


@pytest.mark.parametrize("search", [False, True])
def test_nvfp4_scales_are_rounded_and_span_the_largest(search: bool) -> None:
    weight = random()
    common = fp4.global_scale(weight.abs().amax())
    codes, scales = fp4.nvfp4(weight, common, search=search)
    assert scales.dtype == torch.float8_e4m3fn
    assert float(common) == pytest.approx(2688 / float(weight.abs().amax()))
    for row in range(len(weight)):
        for group in range(6):
            part = weight[row, 16 * group : 16 * group + 16]
            want = torch.tensor(float(common) * float(part.abs().amax()) / 6).to(torch.float8_e4m3fn).float()
            if not search:
                assert float(scales[row, group]) == (float(want) or 0.125)
            step = float(scales[row, group].float() / common)
            assert codes[row, 16 * group : 16 * group + 16].tolist() == [nearest(float(each), step) for each in part]


@pytest.mark.parametrize("search", [False, True])
def test_mxfp4_exponents_keep_the_largest_below_seven_or_cut_it(search: bool) -> None:
    weight = random()
    codes, exponents = fp4.mxfp4(weight, search=search)
    for row in range(len(weight)):
        for group in range(3):
            part = weight[row, 32 * group : 32 * group + 32]
            step, most = 2.0 ** (int(exponents[row, group]) - 127), float(part.abs().amax())
            if most:
                assert 3.5 <= most / step < (14 if search else 7)
                usual = math.floor(math.log2(most)) - 2 + (most / 2 ** math.floor(math.log2(most)) >= 1.75)
                assert int(exponents[row, group]) - 127 - usual in ((0, -1) if search else (0,))
            assert codes[row, 32 * group : 32 * group + 32].tolist() == [nearest(float(each), step) for each in part]


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_searched_scales_lose_less_than_those_that_span(scheme: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(64, 512)
    common = fp4.global_scale(weight.abs().amax())

    def lost(search: bool) -> float:
        if scheme == "nvfp4":
            codes, scales = fp4.nvfp4(weight, common, search=search)
            steps = scales.float() / common
        else:
            codes, scales = fp4.mxfp4(weight, search=search)
            steps = torch.exp2(scales.float() - 127)
        return float((dequantize(pack(codes), steps) - weight).square().sum())

    gained = 1 - lost(search=True) / lost(search=False)
    assert gained > (0.1 if scheme == "nvfp4" else 0.002)


def test_weights_of_zero_stay_zero_and_tiny_ones_have_a_scale() -> None:
    zeros = torch.zeros(2, 32)
    common = fp4.global_scale(zeros.abs().amax())
    assert float(common) == 1.0
    codes, scales = fp4.nvfp4(zeros, common)
    assert not codes.any()
    assert bool((scales.float() > 0).all())
    codes, exponents = fp4.mxfp4(zeros)
    assert not codes.any()
    assert bool(torch.isfinite(dequantize(pack(codes), exponents)).all())
    tiny = torch.full((1, 32), 1e-30)
    assert bool(torch.isfinite(fp4.global_scale(tiny.amax())).all())
