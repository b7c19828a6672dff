"""GPTQ against a slow reference that inverts and downdates the Hessian in float64, and against rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.algorithms import gptq, rtn
from optikit.algorithms.correction import move
from optikit.algorithms.grid import Grid, dequantize, fit


def corrected(weight, hessian, lacking, *, damp, tokens):
    return weight + move(hessian, lacking, damp=damp, tokens=tokens)


def inputs(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Correlated inputs with a few loud channels, as language models have them."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw) / width**0.5 + torch.eye(width)
    loud = 1 + 9 * (torch.rand(width, generator=draw) < 0.1)
    return (torch.randn(tokens, width, generator=draw) @ mix) * loud


def layer(rows: int, width: int, seed: int, tokens: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    x = inputs(tokens, width, seed)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1)) * 0.05
    return weight, x.T @ x / tokens


def lost(weight: torch.Tensor, new: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (weight - new).double()
    return float(((error @ hessian.double()) * error).sum())


def reference(weight, hessian, grid, *, damp, act_order, mask=None):
    """Optimal brain surgeon, one column at a time: eq. 2 of the paper and nothing else."""
    width = len(hessian)
    h = hessian.double().clone()
    h.diagonal().add_(damp * hessian.double().diagonal().mean())
    inverse = torch.linalg.inv(h)
    scales, zeros = fit(weight, grid, (1 / inverse.diagonal()).float())
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(width)
    left, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    size = grid.width(width)
    for j in order.tolist():
        scale, zero = scales[:, j // size].double(), zeros[:, j // size].double()
        code = (torch.round(left[:, j] / scale) + zero).clamp(0, grid.qmax)
        if mask is not None:
            code = torch.where(mask[:, j], code, zero)
        codes[:, j] = code.byte()
        error = left[:, j] - (code - zero) * scale
        left -= torch.outer(error / inverse[j, j], inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "group", "bits"),
    [(5, 1, -1, 4), (8, 24, 8, 4), (3, 200, 40, 4), (16, 160, -1, 4), (4, 96, 32, 8), (1, 7, 7, 4)],
)
def test_codes_are_those_of_the_slow_reference(rows, width, group, bits, sym, act_order):
    weight, hessian = layer(rows, width, seed=rows * width)
    grid = Grid(bits=bits, group_size=group, sym=sym)
    got = gptq.quantize(weight, hessian, grid, damp=0.01, act_order=act_order)
    expected = reference(weight, hessian, grid, damp=0.01, act_order=act_order)
    assert torch.equal(got.quantized.codes, expected)
    assert got.facts["damp"] == 0.01


def test_block_sizes_do_not_matter(monkeypatch):
    weight, hessian = layer(6, 150, seed=3)
    grid = Grid(bits=4, group_size=50, sym=True)
    expected = gptq.quantize(weight, hessian, grid).quantized.codes
    for outer, inner in ((1, 1), (7, 3), (512, 512)):
        monkeypatch.setattr(gptq, "OUTER", outer)
        monkeypatch.setattr(gptq, "INNER", inner)
        assert torch.equal(gptq.quantize(weight, hessian, grid).quantized.codes, expected)


def test_stacked_rows_are_quantized_as_if_alone():
    weight, hessian = layer(12, 64, seed=4)
    grid = Grid(bits=4, group_size=16, sym=True)
    together = gptq.quantize(weight, hessian, grid).quantized
    for rows in (slice(0, 5), slice(5, 12)):
        alone = gptq.quantize(weight[rows], hessian, grid).quantized
        assert torch.equal(together.codes[rows], alone.codes)
        assert torch.equal(together.scales[rows], alone.scales)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), sym=st.booleans(), act_order=st.booleans(), bits=st.sampled_from([4, 8]))
def test_loses_less_than_rounding(seed, sym, act_order, bits):
    weight, hessian = layer(16, 64, seed)
    grid = Grid(bits=bits, group_size=32, sym=sym)
    new = dequantize(*gptq.quantize(weight, hessian, grid, act_order=act_order).quantized)
    rounded = dequantize(*rtn.quantize(weight, grid))
    assert lost(weight, new, hessian) < lost(weight, rounded, hessian)


def test_act_order_helps_on_average():
    grid = Grid(bits=4, group_size=32, sym=True)
    ratio = []
    for seed in range(8):
        weight, hessian = layer(32, 128, seed)
        losses = [
            lost(weight, dequantize(*gptq.quantize(weight, hessian, grid, act_order=order).quantized), hessian)
            for order in (True, False)
        ]
        ratio.append(losses[0] / losses[1])
    assert sum(ratio) / len(ratio) < 0.95


def test_dead_columns_are_rounded_and_pass_nothing_on():
    weight, hessian = layer(4, 32, seed=5)
    dead = [3, 17, 18]
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    weight[:, dead] = 0.01  # below every extreme, so that scales don't depend on them
    grid = Grid(bits=4, group_size=16, sym=True, search=False)
    got = gptq.quantize(weight, hessian, grid).quantized.codes
    assert torch.equal(got[:, dead], rtn.quantize(weight, grid).codes[:, dead])
    other = weight.clone()
    other[:, dead] = -0.03
    again = gptq.quantize(other, hessian, grid).quantized.codes
    alive = [j for j in range(32) if j not in dead]
    assert torch.equal(got[:, alive], again[:, alive])


def test_singular_hessian_is_damped():
    x = inputs(tokens=4, width=32, seed=6)
    weight, _ = layer(4, 32, seed=6)
    got = gptq.quantize(weight, x.T @ x / 4, Grid(bits=4, group_size=32, sym=True))
    assert got.facts["damp"] == 0.01
    assert torch.isfinite(dequantize(*got.quantized)).all()


def test_indefinite_hessian_takes_more_damping():
    weight, hessian = layer(4, 32, seed=7)
    hessian = hessian - 0.05 * hessian.diagonal().mean() * torch.eye(32)
    assert torch.linalg.eigvalsh(hessian).min() < -0.01 * hessian.diagonal().mean()
    got = gptq.quantize(weight, hessian, Grid(bits=4, group_size=32, sym=True))
    assert got.facts["damp"] == pytest.approx(0.1)


def test_hopeless_hessian_falls_back_to_rounding():
    weight, hessian = layer(4, 32, seed=8)
    grid = Grid(bits=4, group_size=32, sym=True)
    got = gptq.quantize(weight, hessian - 100 * torch.eye(32), grid)
    assert got.facts["damp"] == 0.0
    assert torch.equal(got.quantized.codes, rtn.quantize(weight, grid).codes)


def test_hessian_of_zeros_is_rounding():
    weight, _ = layer(4, 32, seed=9)
    grid = Grid(bits=4, group_size=32, sym=True, search=False)
    got = gptq.quantize(weight, torch.zeros(32, 32), grid)
    assert torch.equal(got.quantized.codes, rtn.quantize(weight, grid).codes)


@pytest.mark.parametrize("act_order", [True, False])
def test_masked_weights_stay_zero_and_the_rest_makes_up_for_it(act_order):
    weight, hessian = layer(16, 64, seed=10)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    weight = weight * mask
    grid = Grid(bits=4, group_size=32, sym=False)
    got = gptq.quantize(weight, hessian, grid, act_order=act_order, mask=mask).quantized
    new = dequantize(*got)
    assert (new[~mask] == 0).all()
    assert torch.equal(got.codes, reference(weight, hessian, grid, damp=0.01, act_order=act_order, mask=mask))
    assert lost(weight, new, hessian) < lost(weight, dequantize(*rtn.quantize(weight, grid, mask)), hessian)


def test_rows_of_zeros_and_of_one_value():
    weight, hessian = layer(3, 32, seed=11)
    weight[0] = 0
    weight[1] = 0.25
    for sym in (True, False):
        new = dequantize(*gptq.quantize(weight, hessian, Grid(bits=4, group_size=16, sym=sym)).quantized)
        assert (new[0] == 0).all()
        assert (new[1] - 0.25).abs().max() < 0.02


def test_group_size_must_divide():
    weight, hessian = layer(2, 30, seed=12)
    with pytest.raises(ValueError, match="group_size 16 does not divide 30 columns"):
        gptq.quantize(weight, hessian, Grid(bits=4, group_size=16, sym=True))


def test_correction_is_least_squares():
    x = inputs(512, 24, seed=13).double()
    dense = 1.1 * x + 0.05 * inputs(512, 24, seed=14)
    weight = layer(6, 24, seed=13)[0].double()
    wanted = dense @ weight.T
    hessian, lacking = x.T @ x / 512, (wanted - x @ weight.T).T @ x / 512
    new = corrected(weight, hessian, lacking, damp=1e-12, tokens=512)
    assert torch.allclose(new, torch.linalg.lstsq(x, wanted).solution.T, atol=1e-6)
    assert torch.allclose(corrected(weight, hessian, lacking, damp=1e6, tokens=512), weight, atol=1e-5)
    indefinite = hessian - 1e3 * torch.eye(24)
    assert torch.equal(corrected(weight, indefinite, lacking, damp=0.01, tokens=512), weight)


@pytest.mark.parametrize("tokens", [24, 48, 120])
def test_correction_from_few_tokens_is_held_back(tokens):
    """What is lacking here is noise alone: whatever is corrected is wrong on other inputs."""
    x, noise = inputs(tokens, 24, seed=15), torch.randn(tokens, 6, generator=torch.Generator().manual_seed(16))
    weight = layer(6, 24, seed=15)[0]
    hessian, lacking = x.T @ x / tokens, noise.T @ x / tokens
    held, free = (corrected(weight, hessian, lacking, damp=0.05, tokens=each) for each in (tokens, 24 * 10))
    others = inputs(512, 24, seed=17)
    wrong_held, wrong_free = (((others @ (each - weight).T) ** 2).mean() for each in (held, free))
    assert 0 < wrong_held < wrong_free
