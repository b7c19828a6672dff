"""SparseGPT in the walk: what it falls back to where calibration never reached a layer, and that it says so."""

from __future__ import annotations

from functools import partial

import torch

from optikit.algorithms import magnitude, sparsegpt
from optikit.algorithms.sparsity import Pattern
from optikit.calibration.method import Batch, Group
from optikit.calibration.methods.pruning import GramPruning
from optikit.calibration.write_checkpoint import SparseLayout

HALF = Pattern(0.5)


def group() -> Group:
    draw = torch.Generator().manual_seed(0)
    weights = (torch.randn(6, 16, generator=draw), torch.randn(4, 16, generator=draw))
    return Group(names=("q", "k"), weights=weights)


def applied(inputs: torch.Tensor):
    method = GramPruning(SparseLayout(HALF), kernel=partial(sparsegpt.prune_group, damp=0.01))
    statistic = method.statistic(group())
    statistic.update(Batch(inputs=inputs, dense_inputs=inputs))
    return method.apply(group(), statistic)


def test_a_layer_that_calibration_never_reached_is_pruned_by_magnitude():
    found = applied(torch.zeros(32, 16))
    for before, after in zip(group().weights, found.weights, strict=True):
        assert torch.equal(after, before.masked_fill(magnitude.mask(before, HALF), 0))
    assert found.facts == {"q": {"by_magnitude": True}, "k": {"by_magnitude": True}}


def test_a_layer_that_it_reached_is_not():
    found = applied(torch.randn(64, 16, generator=torch.Generator().manual_seed(1)))
    assert found.facts == {"q": {"by_magnitude": False}, "k": {"by_magnitude": False}}
    before, after = group().weights[0], found.weights[0]
    assert (after == 0).float().mean() == 0.5
    assert not torch.equal(after[after != 0], before[after != 0])
