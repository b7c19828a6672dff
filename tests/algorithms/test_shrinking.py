"""Depth and width importance against definitions written out, and compensation against least squares on the data."""

from __future__ import annotations

import pytest
import torch

from optikit.algorithms import depth, width


def test_influence_is_zero_for_scaling_and_one_for_turning_by_a_right_angle():
    inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert depth.influence(inputs, 3 * inputs) == pytest.approx(0, abs=1e-6)
    assert depth.influence(inputs, torch.tensor([[0.0, 1.0], [0.0, -1.0]])) == pytest.approx(1 + 2, abs=1e-6)


def test_influence_adds_over_batches():
    draw = torch.Generator().manual_seed(0)
    before, after = torch.randn(4, 7, 16, generator=draw), torch.randn(4, 7, 16, generator=draw)
    slow = sum(
        1 - float(x @ y / (x.norm() * y.norm()))
        for x, y in zip(before.reshape(-1, 16), after.reshape(-1, 16), strict=True)
    )
    assert depth.influence(before, after) == pytest.approx(slow, rel=1e-5)
    assert depth.influence(before[:2], after[:2]) + depth.influence(before[2:], after[2:]) == pytest.approx(slow)


def test_least_influential_blocks_go_and_the_ends_may_stay():
    values = [0.0, 0.3, 0.1, 0.1, 0.2, 0.0]
    assert depth.removed(values, 2) == (0, 5)
    assert depth.removed(values, 2, keep_first=1, keep_last=1) == (2, 3)
    assert depth.removed(values, 1, keep_first=1, keep_last=1) == (3,)
    with pytest.raises(ValueError, match="3 of 2 blocks"):
        depth.removed(values, 3, keep_first=2, keep_last=2)


def test_taylor_ranks_groups_as_removing_them_changes_the_loss():
    """On a small MLP the first-order estimate must order channels as the real change of the loss does."""
    draw = torch.Generator().manual_seed(0)
    up = torch.randn(12, 8, generator=draw, requires_grad=True)
    down = torch.randn(5, 12, generator=draw, requires_grad=True)
    with torch.no_grad():
        down *= torch.logspace(-2, 0, 12)
    inputs, targets = torch.randn(200, 8, generator=draw), torch.randn(200, 5, generator=draw)

    def loss(keep: torch.Tensor) -> torch.Tensor:
        return ((torch.tanh(inputs @ up.T) * keep) @ down.T - targets).square().mean()

    loss(torch.ones(12)).backward()
    assert up.grad is not None
    assert down.grad is not None
    found = width.taylor([width.Part(up, up.grad), width.Part(down, down.grad, columns=True)]).detach()
    with torch.no_grad():
        real = torch.stack([(loss(1 - torch.eye(12)[j]) - loss(torch.ones(12))).abs() for j in range(12)])
    ranks = torch.stack([found.argsort().argsort(), real.argsort().argsort()]).float()
    assert torch.corrcoef(ranks)[0, 1] > 0.7


def test_taylor_sums_over_a_group_s_rows_and_columns():
    weight, gradient = torch.full((4, 6), 2.0), torch.full((4, 6), -0.5)
    rows = width.Part(weight, gradient, size=2)
    columns = width.Part(weight, gradient, columns=True, size=3)
    assert torch.equal(width.taylor([rows, columns]), torch.tensor([24.0, 24.0]))


def test_contribution_is_the_size_of_the_groups_outputs():
    draw = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 8, generator=draw), torch.randn(50, 8, generator=draw)
    slow = [float((inputs[:, s] @ weight[:, s].T).norm()) for s in (slice(0, 4), slice(4, 8))]
    found = width.contribution(weight, inputs.T @ inputs, 4)
    assert found.tolist() == pytest.approx(slow, rel=1e-5)


def test_compensation_is_least_squares_on_the_remaining_channels():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 4, generator=draw) @ torch.randn(4, 16, generator=draw)
    inputs += 0.3 * torch.randn(300, 16, generator=draw)
    weight, keep = torch.randn(6, 16, generator=draw), torch.tensor([0, 2, 3, 5, 8, 9, 12, 15])
    found = width.compensate(weight, inputs.T @ inputs, keep, damp=1e-9)
    slow = torch.linalg.lstsq(inputs[:, keep], inputs @ weight.T).solution.T
    assert torch.allclose(found, slow, atol=1e-3)
    plain = (inputs @ weight.T - inputs[:, keep] @ weight[:, keep].T).square().sum()
    assert (inputs @ weight.T - inputs[:, keep] @ found.T).square().sum() < 0.3 * plain


def test_compensation_without_inputs_is_plain_removal():
    weight = torch.randn(3, 6)
    keep = torch.tensor([1, 4])
    assert torch.equal(width.compensate(weight, torch.zeros(6, 6), keep), weight[:, keep])
