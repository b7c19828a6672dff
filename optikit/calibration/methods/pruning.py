"""Zeros by any algorithm, where they fall, in the source's layout and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optikit.algorithms import magnitude
from optikit.algorithms.sparsity import Pattern
from optikit.calibration import distributed
from optikit.calibration.gram import Gram, gram_of
from optikit.calibration.method import Batch, Group, Result, Strips
from optikit.calibration.write_checkpoint import SparseLayout

NormKernel = Callable[[Tensor, Tensor, Pattern], Tensor]
"""Weight (out, in), and the squared norm (in,) float64 of each input channel → (out, in) bool: True becomes zero."""
GramKernel = Callable[[Sequence[Tensor], Tensor, Pattern], tuple[list[Tensor], Mapping[str, Any]]]
"""Weights (out, in) that see the same input, and its Gram matrix (in, in) → new weights, and facts."""


class Norms:
    """Sums each channel's square: the diagonal of Xᵀ X.

    Args:
        group: The linears that see the inputs.
    """

    def __init__(self, group: Group) -> None:
        self.squared = torch.zeros(group.width, dtype=torch.float64, device=group.weights[0].device)

    def update(self, batch: Batch) -> None:
        """Add a batch's inputs."""
        self.squared += batch.inputs.float().square().sum(dim=0, dtype=torch.float64)

    def merge(self) -> None:
        """Add what the other processes have seen."""
        distributed.total(self.squared)


def _result(group: Group, pruned: Iterable[Tensor], facts: Mapping[str, Any]) -> Result:
    return Result(weights=tuple(pruned), facts=dict.fromkeys(group.names, facts))


@dataclass(frozen=True)
class DataFreePruning:
    """Zeros the smallest weights of a linear."""

    layout: SparseLayout

    def strips(self, weight: Strips, _: str) -> Iterator[dict[str, Tensor]]:
        """Yield each strip of a linear with zeros."""
        masks = magnitude.masks(weight, self.layout.pattern)
        return ({"weight": rows.masked_fill(mask, 0)} for rows, mask in zip(weight(), masks, strict=True))


@dataclass(frozen=True)
class NormPruning:
    """Zeros what a kernel chooses by weights and the norms of their inputs."""

    layout: SparseLayout
    kernel: NormKernel
    correct_damp: None = None

    def statistic(self, group: Group) -> Norms:
        """Return empty norms."""
        return Norms(group)

    def apply(self, group: Group, statistic: Norms) -> Result:
        """Prune every linear of the group on its own."""
        seen, pattern = statistic.squared, self.layout.pattern
        return _result(group, (w.masked_fill(self.kernel(w, seen, pattern), 0) for w in group.weights), {})


@dataclass(frozen=True)
class GramPruning:
    """Removes weights by a kernel that moves the others to make up for them.

    Attributes:
        layout: Where zeros may lie.
        kernel: The algorithm.
        correct_damp: See `Method`.
    """

    layout: SparseLayout
    kernel: GramKernel
    correct_damp: float | None = None

    def statistic(self, group: Group) -> Gram:
        """Return an empty Gram matrix."""
        return gram_of(group, self.correct_damp)

    def apply(self, group: Group, statistic: Gram) -> Result:
        """Prune every linear of the group on its own: a block's mask is chosen among the weights of one linear."""
        pruned, facts = self.kernel(group.split(group.pruned_target), statistic.mean(), self.layout.pattern)
        return _result(group, pruned, facts)
