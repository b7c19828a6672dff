"""Grids: what codes can say, and that searching them pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.algorithms import rtn
from optikit.algorithms.grid import SMALLEST_SCALE, Grid, dequantize, fit, minmax, nest, pruned_mask, stored_scale


def weights(rows: int, columns: int, seed: int, size: float = 0.05) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


GRIDS = [
    Grid(bits=bits, group_size=group, sym=sym, search=search)
    for bits in (4, 8)
    for group in (8, -1)
    for sym in (True, False)
    for search in (True, False)
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-30, 1e-7, 1e-3, 1.0, 1e4]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
)
def test_codes_scales_and_zeros_are_what_the_format_can_hold(grid, seed, size, shift):
    weight = weights(4, 24, seed, size) + shift * size
    codes, scales, zeros = rtn.quantize(weight, grid)
    assert codes.dtype == torch.uint8
    assert scales.dtype == torch.float16
    assert codes.max() <= grid.qmax
    assert torch.isfinite(scales).all()
    assert (scales != 0).all()
    assert (zeros >= 1).all()
    assert (zeros <= grid.qmax).all()
    if grid.sym:
        assert (zeros == 2 ** (grid.bits - 1)).all()
    new = dequantize(codes, scales, zeros)
    assert torch.isfinite(new).all()
    assert ((new - weight).abs() <= weight.abs().max() + SMALLEST_SCALE * grid.qmax).all()


def test_every_weight_takes_the_nearest_point():
    weight = weights(5, 32, seed=1)
    for grid in (Grid(bits=4, group_size=8, sym=True), Grid(bits=4, group_size=8, sym=False)):
        codes, scales, zeros = rtn.quantize(weight, grid)
        points = (torch.arange(16)[None, None] - zeros.float()[..., None]) * scales.float()[..., None]
        nearest = (weight.reshape(5, 4, 8, 1) - points[:, :, None]).abs().amin(-1).reshape(5, 32)
        assert torch.allclose((dequantize(codes, scales, zeros) - weight).abs(), nearest, atol=1e-6)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), sym=st.booleans(), bits=st.sampled_from([4, 8]))
def test_searching_beats_the_extremes(seed, sym, bits):
    weight = weights(16, 64, seed)
    losses = [
        (dequantize(*rtn.quantize(weight, Grid(bits=bits, group_size=32, sym=sym, search=search))) - weight).norm()
        for search in (True, False)
    ]
    assert losses[0] < losses[1]


def test_importance_moves_the_scale_to_the_columns_that_matter():
    weight = weights(64, 16, seed=2)
    importance = torch.full((16,), 0.01)
    importance[:4] = 100.0
    grid = Grid(bits=4, group_size=16, sym=True)
    errors = []
    for cost in (None, importance):
        chosen = fit(weight, grid, cost)
        errors.append(((dequantize(*rtn.nearest(weight, grid, chosen)) - weight)[:, :4]).norm())
    assert errors[1] < errors[0]


def test_a_symmetric_grid_spends_its_extra_code_on_the_longer_side():
    weight = torch.tensor([[8.0, -7.0, 3.0, 1.0], [-8.0, 7.0, -3.0, 1.0]])
    codes, scales, zeros = rtn.quantize(weight, Grid(bits=4, group_size=4, sym=True))
    assert torch.equal(dequantize(codes, scales, zeros), weight)
    assert scales[:, 0].tolist() == [-1.0, 1.0]


def test_asymmetric_extremes_are_reached():
    weight = torch.tensor([[-1.0, 14.0, 3.0, 0.0]])
    scales, zeros = minmax(weight.reshape(1, 1, 4), Grid(bits=4, group_size=4, sym=False))
    assert (scales.item(), zeros.item()) == (1.0, 1.0)


@pytest.mark.parametrize("sym", [True, False])
def test_groups_of_zeros_are_zero(sym):
    weight = torch.zeros(2, 16)
    weight[0, :8] = 1.0
    new = dequantize(*rtn.quantize(weight, Grid(bits=4, group_size=8, sym=sym)))
    assert (new[1] == 0).all()
    assert (new[0, 8:] == 0).all()


def test_stored_scales_keep_their_sign_and_never_vanish():
    scales = stored_scale(torch.tensor([0.0, -1e-12, 1e9, -0.1]))
    assert scales.tolist() == [SMALLEST_SCALE, -SMALLEST_SCALE, 65504.0, torch.tensor(-0.1).half().item()]


def test_rows_are_searched_alike_however_they_are_cut(monkeypatch):
    weight, grid = weights(40, 64, seed=3), Grid(bits=4, group_size=16, sym=True)
    whole = fit(weight, grid)
    monkeypatch.setattr("optikit.algorithms.grid.CHUNK_ELEMENTS", 100)
    assert torch.equal(fit(weight, grid).scales, whole.scales)


def test_a_weight_counts_as_pruned_from_a_quarter_of_zeros():
    weight = torch.ones(4, 8)
    assert pruned_mask(weight) is None
    weight[:, :2] = 0
    mask = pruned_mask(weight)
    assert mask is not None
    assert torch.equal(mask, weight != 0)


def test_width_of_a_group():
    assert Grid(bits=4, group_size=-1, sym=True).width(48) == 48
    with pytest.raises(ValueError, match="group_size 32 does not divide 48 columns"):
        Grid(bits=4, group_size=32, sym=True).width(48)


@given(
    rows=st.lists(st.lists(st.floats(2.0**-20, 60000.0), min_size=6, max_size=6), min_size=1, max_size=4),
    signs=st.integers(0, 63),
)
def test_nested_scales_are_whole_multiples_that_float16_holds(rows, signs):
    sign = torch.tensor([-1.0 if signs >> i & 1 else 1.0 for i in range(6)])
    given_scales = stored_scale(torch.tensor(rows) * sign)
    found = nest(given_scales, 15)
    assert torch.equal(found.half().float(), found)
    assert torch.equal(found.sign(), given_scales.sign())
    for row in found.abs():
        candidates = [row.max() / k for k in range(1, 16)]
        assert any(
            all(0.5 < float(s / base) < 15.5 and float(s / base).is_integer() for s in row) for base in candidates
        )


def test_nested_scales_cost_little_and_code_products_fit_eight_bits():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight = weight * torch.rand(64, 4, generator=torch.Generator().manual_seed(1)).add(0.3).repeat_interleave(64, 1)
    lost = {}
    for nested in (False, True):
        grid = Grid(bits=4, group_size=64, sym=True, nested=nested)
        codes, scales, zeros = rtn.quantize(weight, grid)
        lost[nested] = float((dequantize(codes, scales, zeros) - weight).square().sum())
    assert lost[False] < lost[True] < 1.15 * lost[False]
    base = scales.float().abs().amax(1, keepdim=True) / 15
    eight = (codes.float().reshape(64, 4, 64) - 8) * (scales.float() / base).round()[..., None]
    assert eight.abs().max() <= 127
