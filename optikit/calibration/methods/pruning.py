"""Magnitude, Wanda and SparseGPT as methods of the walk: zeros where they fall, in the source's layout and dtype."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optikit.algorithms import magnitude, sparsegpt, wanda
from optikit.algorithms.hessian import inverse_factor
from optikit.algorithms.sparsity import Pattern
from optikit.calibration import distributed
from optikit.calibration.gram import Gram
from optikit.calibration.method import Applied, Group


class Norms:
    """Sums each channel's square: the diagonal of Xᵀ X.

    Args:
        width: Input features.
        device: Where to sum.
    """

    def __init__(self, width: int, device: str) -> None:
        self.squared = torch.zeros(width, dtype=torch.float64, device=device)

    def update(self, inputs: Tensor) -> None:
        """Add (tokens, width) inputs."""
        self.squared += inputs.float().square().sum(dim=0, dtype=torch.float64)

    def merge(self) -> None:
        """Add what the other processes have seen."""
        distributed.total(self.squared)


def _applied(group: Group, pruned: Iterable[Tensor], **facts: Any) -> Applied:
    weights = tuple(pruned)
    return Applied(weights=weights, tensors={}, facts=dict.fromkeys(group.names, facts))


@dataclass(frozen=True)
class Magnitude:
    """Zero the smallest weights of every linear."""

    pattern: Pattern

    def apply(self, group: Group) -> Applied:
        """Prune every linear of the group on its own."""
        return _applied(group, (w.masked_fill(magnitude.mask(w, self.pattern), 0) for w in group.weights))


@dataclass(frozen=True)
class Wanda:
    """Zero the weights whose product with their input is smallest."""

    pattern: Pattern

    def statistic(self, width: int, device: str) -> Norms:
        """Return empty norms."""
        return Norms(width, device)

    def apply(self, group: Group, statistic: Norms) -> Applied:
        """Prune every linear of the group; rows are compared each on its own."""
        seen = statistic.squared
        return _applied(group, (w.masked_fill(wanda.mask(w, seen, self.pattern), 0) for w in group.weights))


@dataclass(frozen=True)
class SparseGpt:
    """Remove weights and let the remaining ones make up for them."""

    pattern: Pattern
    damp: float

    def statistic(self, width: int, device: str) -> Gram:
        """Return an empty Hessian."""
        return Gram(width, device)

    def apply(self, group: Group, statistic: Gram) -> Applied:
        """Prune every linear of the group on its own: a block's mask is chosen among the weights of one linear."""
        hessian = statistic.mean()
        reached = bool(hessian.diagonal().any())
        found = inverse_factor(hessian, self.damp) if reached else None
        if found is None:
            pruned = [weight.masked_fill(magnitude.mask(weight, self.pattern), 0) for weight in group.weights]
        else:
            pruned = [sparsegpt.prune(weight, found[0], self.pattern)[0] for weight in group.weights]
        return _applied(group, pruned, by_magnitude=found is None)
