"""NF4 against a search through all levels, weight by weight, and against integers of the same size."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from optikit.algorithms import nf4, rtn
from optikit.algorithms.grid import Grid, dequantize

WEIGHTS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=2 * nf4.BLOCK + 3)


def nearest(value: float, levels: list[float]) -> float:
    return min(levels, key=lambda level: abs(level - value))


@given(WEIGHTS)
def test_every_weight_goes_to_the_nearest_level_of_its_block(weights):
    codes, absmax = nf4.quantize(torch.tensor(weights))
    back = nf4.dequantize(codes, absmax)
    assert len(codes) == len(back) == len(weights)
    for first in range(0, len(weights), nf4.BLOCK):
        block = weights[first : first + nf4.BLOCK]
        largest = max(map(abs, block))
        assert absmax[first // nf4.BLOCK] == torch.tensor(largest)
        for weight, found in zip(block, back[first:].tolist(), strict=False):
            best = largest * nearest(weight / largest, list(nf4.LEVELS)) if largest > 1e-30 else 0.0
            assert abs(found - weight) <= abs(best - weight) + 1e-6 * largest


@given(WEIGHTS)
def test_zeros_stay_zeros_whatever_is_around_them(weights):
    dense = torch.tensor(weights)
    dense[::2] = 0
    codes, absmax = nf4.quantize(dense)
    assert (codes[::2] == nf4.ZERO).all()
    constants = nf4.dequantize_constants(nf4.quantize_constants(absmax))
    assert (nf4.dequantize(codes, constants)[::2] == 0).all()


@given(st.lists(st.floats(2**-10, 100, width=32), min_size=1, max_size=2 * nf4.CONSTANTS_BLOCK + 5))
def test_every_constant_goes_to_the_nearest_of_its_256_values(absmax):
    wanted = torch.tensor(absmax)
    constants = nf4.quantize_constants(wanted)
    found = nf4.dequantize_constants(constants)
    for first in range(0, len(absmax), nf4.CONSTANTS_BLOCK):
        block = slice(first, first + nf4.CONSTANTS_BLOCK)
        scale = constants.scales[first // nf4.CONSTANTS_BLOCK]
        possible = nf4.dynamic_map() * scale + constants.offset
        best = (possible[None] - wanted[block, None]).abs().amin(dim=1)
        assert ((found[block] - wanted[block]).abs() <= best + 1e-5 * (scale + constants.offset)).all()


def test_a_large_weight_is_rounded_in_parts_as_it_is_in_one(monkeypatch):
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(2))
    whole = nf4.quantize(weight)
    monkeypatch.setattr(nf4, "CHUNK", 5 * nf4.BLOCK)
    assert all(torch.equal(part, one) for part, one in zip(nf4.quantize(weight), whole, strict=True))


def test_normal_weights_lose_less_than_on_integers_over_the_same_blocks():
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    codes, absmax = nf4.quantize(weight)
    error = (nf4.dequantize(codes, absmax).view_as(weight) - weight).square().mean()
    twice = nf4.dequantize_constants(nf4.quantize_constants(absmax))
    double_error = (nf4.dequantize(codes, twice).view_as(weight) - weight).square().mean()
    grid = Grid(bits=4, group_size=nf4.BLOCK, sym=True, search=False)
    integers = (dequantize(*rtn.quantize(weight, grid)) - weight).square().mean()
    assert error < 0.82 * integers
    assert double_error < 1.02 * error


def test_dynamic_map_is_ascending_and_has_zero_and_one():
    levels = nf4.dynamic_map()
    assert len(levels) == 256
    assert (levels[1:] > levels[:-1]).all()
    assert levels[-1] == 1
    assert (levels == 0).sum() == 1
