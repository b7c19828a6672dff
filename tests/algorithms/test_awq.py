"""The scale search against one that really computes outputs, against plain rounding, and its folding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optikit.algorithms import awq

GROUP = 16


def problem(seed: int = 0, *, rows: int = 24, width: int = 32, tokens: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inputs with a few channels thirty times louder than the others, and their Gram matrix."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=draw)
    inputs = torch.randn(tokens, width, generator=draw) + torch.randn(tokens, 1, generator=draw)
    inputs[:, torch.randperm(width, generator=draw)[:3]] *= 30
    return weight, inputs, inputs.T @ inputs


def rounding(weight: Tensor) -> Tensor:
    """Four bits, asymmetric, one range per group: written out, independent of the package."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    step = ((high - low) / 15).clamp_min(1e-8)
    zero = torch.round(-low / step)
    return (((groups / step + zero).round().clamp(0, 15) - zero) * step).reshape(weight.shape)


def outputs_error(weight: Tensor, inputs: Tensor, scale: Tensor) -> float:
    """‖(W - Q(W s)/s) X‖², with the outputs really computed."""
    return float((inputs @ weight.T - (inputs / scale) @ rounding(weight * scale).T).double().square().sum())


def test_output_error_is_that_of_the_outputs():
    weight, inputs, gram = problem()
    delta = rounding(weight) - weight
    slow = [sum(float((x @ d) ** 2) for x in inputs) for d in delta]
    assert torch.allclose(awq.output_error(delta, gram), torch.tensor(slow), rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_search_is_as_good_as_trying_every_scale_on_the_inputs_and_beats_plain_rounding(seed):
    weight, inputs, gram = problem(seed)
    found = awq.search_scale(weight, gram, rounding, group_size=GROUP, steps=10)
    size = inputs.square().sum(0).sqrt()
    relative = weight.abs().reshape(-1, GROUP)
    share = (relative / (relative.amax(1, keepdim=True) + 1e-6)).reshape(weight.shape).mean(0)
    tried = {None: outputs_error(weight, inputs, torch.ones(32))}
    for alpha in (step / 10 for step in range(1, 11)):
        for duo in (False, True):
            scale = (size / size.mean()).clamp_min(1e-4) ** alpha / (share ** (1 - alpha) + 1e-4 if duo else 1)
            tried[alpha, duo] = outputs_error(weight, inputs, scale / (scale.max() * scale.min()).sqrt())
    assert found.error < 1.02 * min(tried.values())
    assert found.plain_error == pytest.approx(tried[None], rel=1e-3)
    assert outputs_error(weight, inputs, found.scale) == pytest.approx(found.error, rel=1e-3)
    assert found.error < 0.6 * found.plain_error


def test_the_paper_s_size_mean_of_magnitudes_finds_nothing_better():
    ours, the_papers = 0.0, 0.0
    for seed in range(6):
        weight, inputs, gram = problem(seed)
        ours += awq.search_scale(weight, gram, rounding, group_size=GROUP).error
        size = inputs.abs().mean(0)
        the_papers += min(
            outputs_error(weight, inputs, awq.scale_of(size, family, step / 20))
            for step in range(1, 21)
            for family in (None, awq.weight_size_of(weight, GROUP))
        )
    assert ours < 1.05 * the_papers


def test_without_inputs_there_is_no_scale():
    weight, _, gram = problem()
    found = awq.search_scale(weight, torch.zeros_like(gram), rounding, group_size=GROUP)
    assert found.alpha is None
    assert torch.equal(found.scale, torch.ones(32))


def test_a_channel_that_is_never_active_gets_a_finite_scale():
    weight, inputs, _ = problem()
    inputs[:, 4] = 0
    found = awq.search_scale(weight, inputs.T @ inputs, rounding, group_size=GROUP)
    assert found.alpha is not None
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()


def test_tied_channels_share_a_scale():
    weight, _, gram = problem()
    ties = torch.arange(32) % 8
    found = awq.search_scale(weight, gram, rounding, group_size=GROUP, ties=ties)
    assert found.alpha is not None
    assert torch.equal(found.scale.reshape(4, 8), found.scale[:8].expand(4, 8))
    assert found.error < found.plain_error


def test_tie_is_the_root_of_the_mean_square():
    tied = awq.tie(torch.tensor([3.0, 1.0, 4.0, 7.0]), torch.tensor([0, 1, 0, 1]))
    assert torch.allclose(tied, torch.tensor([12.5, 25.0, 12.5, 25.0]).sqrt())


def test_search_looks_at_some_rows_of_a_tall_weight_and_decides_as_well():
    weight, inputs, gram = problem(rows=3000, tokens=60)
    found = awq.search_scale(weight, gram, rounding, group_size=GROUP)
    best = min(
        outputs_error(weight, inputs, awq.scale_of(gram.diagonal().sqrt(), family, step / 20))
        for step in range(1, 21)
        for family in (None, awq.weight_size_of(weight, GROUP))
    )
    assert outputs_error(weight, inputs, found.scale) < 1.02 * best


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_folding_changes_nothing_but_where_the_scale_is(offset, dtype):
    draw = torch.Generator().manual_seed(0)
    norm = torch.randn(32, generator=draw).to(dtype)
    norm[3] = -offset  # a channel that the norm switches off
    wanted = torch.rand(32, generator=draw) * 4 + 0.1
    folded, exact = awq.fold(norm, wanted, offset=offset)
    assert folded.dtype == dtype
    assert torch.allclose((folded.float() + offset) * exact, norm.float() + offset, rtol=1e-6, atol=1e-7)
    live = torch.arange(32) != 3
    assert torch.allclose(exact[live], wanted[live], rtol=0.05 if dtype == torch.bfloat16 else 0.01)
    assert exact[3] == 1
