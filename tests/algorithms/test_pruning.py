"""Magnitude, Wanda and SparseGPT against slow references, against each other and against chance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optikit.algorithms import magnitude, sparsegpt, wanda
from optikit.algorithms.hessian import inverse_factor
from optikit.algorithms.sparsity import Pattern, holds, smallest

PATTERNS = [Pattern(0.5), Pattern(0.3), Pattern(0.5, group=4), Pattern(0.5, group=8)]


def problem(*, rows: int = 24, width: int = 32, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and inputs of eight common factors, noise and a few loud channels; with their Hessian."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=draw)
    common = torch.randn(tokens, 8, generator=draw) @ torch.randn(8, width, generator=draw)
    inputs = common / 2 + torch.randn(tokens, width, generator=draw)
    inputs *= 0.3 + 3 * torch.rand(width, generator=draw) ** 2
    return weight, inputs, inputs.T @ inputs


def error(inputs: Tensor, weight: Tensor, pruned: Tensor) -> float:
    return float((inputs @ (weight - pruned).T).square().sum())


def zeroed(weight: Tensor, mask: Tensor) -> Tensor:
    return weight.masked_fill(mask, 0)


@given(
    scores=st.lists(st.lists(st.integers(0, 5), min_size=8, max_size=8), min_size=1, max_size=6),
    sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    group=st.sampled_from([0, 4, 8]),
    per_row=st.booleans(),
)
def test_smallest_removes_exactly_as_many_as_asked_and_never_a_larger_before_a_smaller(
    scores, sparsity, group, per_row
):
    tensor = torch.tensor(scores, dtype=torch.float32)
    mask = smallest(tensor, Pattern(sparsity, group=group), per_row=per_row)
    parts, masks = (tensor, mask) if not group else (tensor.reshape(-1, group), mask.reshape(-1, group))
    if not group and not per_row:
        parts, masks = tensor.reshape(1, -1), mask.reshape(1, -1)
    for part, removed in zip(parts, masks, strict=True):
        assert int(removed.sum()) == round(sparsity * len(part))
        if removed.any() and not removed.all():
            assert part[removed].max() <= part[~removed].min()
    assert holds(tensor.masked_fill(mask, 0), Pattern(sparsity, group=group))


@given(
    values=st.lists(st.lists(st.integers(-3, 3), min_size=8, max_size=8), min_size=1, max_size=9),
    noise=st.sampled_from([0.0, 1e-3]),
    pattern=st.sampled_from([Pattern(0.0), *PATTERNS, Pattern(0.9)]),
    step=st.integers(1, 4),
)
def test_a_weight_read_in_strips_loses_the_same_weights(values, noise, pattern, step):
    weight = torch.tensor(values, dtype=torch.float32)
    weight += noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(values)))
    strips = torch.split(weight, step)
    assert torch.equal(torch.cat(list(magnitude.masks(lambda: iter(strips), pattern))), magnitude.mask(weight, pattern))


def test_equal_scores_go_by_position():
    assert smallest(torch.ones(2, 4), Pattern(0.5)).int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert smallest(torch.ones(2, 4), Pattern(0.5), per_row=True).int().tolist() == [[1, 1, 0, 0]] * 2


def test_holds_sees_a_missing_zero():
    weight = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]])
    assert holds(weight[:, :4], Pattern(0.5, group=4))
    assert not holds(weight, Pattern(0.5, group=4))
    assert not holds(torch.ones(2, 16), Pattern(0.5))


@pytest.mark.parametrize(("sparsity", "group"), [(1.0, 0), (-0.1, 0), (0.3, 4)])
def test_a_pattern_that_cannot_be_is_refused(sparsity, group):
    with pytest.raises(ValueError, match="sparsity"):
        Pattern(sparsity, group=group)


def test_columns_that_the_pattern_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="no multiple"):
        smallest(torch.ones(2, 6), Pattern(0.5, group=4))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_equals_the_equation_element_by_element(pattern):
    weight, inputs, hessian = problem()
    norms = [float(inputs[:, j].norm()) for j in range(weight.shape[1])]
    mask = wanda.mask(weight, hessian.diagonal(), pattern)
    size = pattern.group or weight.shape[1]
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            score = {j: abs(float(weight[row, j])) * norms[j] for j in range(start, start + size)}
            removed = sorted(score, key=score.__getitem__)[: round(pattern.sparsity * size)]
            assert {j for j in score if mask[row, j]} == set(removed)


def test_wanda_falls_back_to_magnitude_where_nothing_was_seen():
    weight, _, _ = problem()
    seen_nothing = wanda.mask(weight, torch.zeros(weight.shape[1]), Pattern(0.5))
    assert torch.equal(seen_nothing, magnitude.mask(weight, Pattern(0.5), per_row=True))


def pruned_by_sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern, **how: int) -> tuple[Tensor, Tensor]:
    found = inverse_factor(hessian, 0.01)
    assert found is not None
    return sparsegpt.prune(weight, found[0], pattern, **how)


def slow_sparsegpt(weight: Tensor, hessian: Tensor, mask: Tensor, damp: float) -> Tensor:
    """The OBS update row by row, with the inverse of the remaining Hessian computed afresh for each column."""
    damped = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(hessian.shape[0])
    result = weight.double().clone()
    for row in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            if mask[row, i]:
                inverse = torch.linalg.inv(damped[i:, i:])
                result[row, i:] -= result[row, i] / inverse[0, 0] * inverse[0]
    return result.masked_fill(mask, 0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [8, 128])
def test_sparsegpt_equals_one_inverse_per_weight(pattern, block):
    weight, _, hessian = problem()
    pruned, mask = pruned_by_sparsegpt(weight, hessian, pattern, block=block)
    slow = slow_sparsegpt(weight, hessian, mask, 0.01)
    assert torch.allclose(pruned.double(), slow, rtol=1e-3, atol=1e-3)
    assert holds(pruned, pattern)
    assert torch.equal(pruned == 0, mask)


def test_sparsegpt_chooses_each_mask_by_the_weights_as_they_have_become():
    # One row, groups of four: after the first group, the second group's weights have moved; redo that by hand.
    weight, _, hessian = problem(rows=1, width=8)
    found = pruned_by_sparsegpt(weight, hessian, Pattern(0.5, group=4))
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(8)
    current = weight[0].double().clone()
    removed: set[int] = set()
    for i in range(8):
        if i % 4 == 0:
            score = {j: float(current[j] ** 2 / torch.linalg.inv(damped[j:, j:])[0, 0]) for j in range(i, i + 4)}
            removed |= set(sorted(score, key=score.__getitem__)[:2])
        if i in removed:
            inverse = torch.linalg.inv(damped[i:, i:])
            current[i:] -= current[i] / inverse[0, 0] * inverse[0]
    assert {j for j in range(8) if found[1][0, j]} == removed


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_method_beats_the_one_that_knows_less(pattern, seed):
    weight, inputs, hessian = problem(rows=48, width=64, tokens=400, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    chance = error(inputs, weight, zeroed(weight, smallest(torch.rand(weight.shape, generator=draw), pattern)))
    plain = error(inputs, weight, zeroed(weight, magnitude.mask(weight, pattern)))
    by_input = error(inputs, weight, zeroed(weight, wanda.mask(weight, hessian.diagonal(), pattern)))
    found = pruned_by_sparsegpt(weight, hessian, pattern)
    assert error(inputs, weight, found[0]) < 0.9 * by_input < 0.8 * plain < 0.7 * chance


def test_sparsegpt_survives_channels_that_calibration_never_reached():
    weight, inputs, _ = problem()
    inputs[:, 5] = 0
    found = pruned_by_sparsegpt(weight, inputs.T @ inputs, Pattern(0.5))
    assert torch.isfinite(found[0]).all()
    assert found[1][:, 5].float().mean() > 0.9  # weights that nothing flows through go first


def test_zeros_that_are_there_already_stay():
    weight, _, hessian = problem()
    before = zeroed(weight, magnitude.mask(weight, Pattern(0.3)))
    found = pruned_by_sparsegpt(before, hessian, Pattern(0.5), block=32)
    assert (found[0][before == 0] == 0).float().mean() > 0.95
    assert wanda.mask(before, hessian.diagonal(), Pattern(0.5))[before == 0].float().mean() > 0.95
