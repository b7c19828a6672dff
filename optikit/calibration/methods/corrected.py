"""Any technique that keeps a Gram matrix, aimed at the dense model's outputs instead of at its own weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optikit.algorithms.correction import corrected
from optikit.algorithms.grid import pruned_mask
from optikit.calibration.gram import Gram, PairedGram
from optikit.calibration.method import Applied, Group, Method


@dataclass(frozen=True)
class Corrected:
    """Move a group's weights so that they make up for what the layers before have lost, then hand them on.

    Attributes:
        method: What is done with the weights that were moved.
        damp: What holds them back, as a fraction of the Gram matrix's mean diagonal.
    """

    method: Method[Gram]
    damp: float

    def statistic(self, group: Group) -> PairedGram:
        """Return an empty Gram matrix, and nothing lacking yet."""
        return PairedGram(group)

    def apply(self, group: Group, statistic: PairedGram) -> Applied:
        """Correct the group's weights and apply the technique to them. Zeros of a pruned weight stay."""
        weight = torch.cat(group.weights)
        moved = corrected(weight, statistic.mean(), statistic.lacking(), damp=self.damp, tokens=statistic.tokens)
        alive = pruned_mask(weight)
        if alive is not None:
            moved = moved * alive
        weights = torch.split(moved, [len(part) for part in group.weights])
        return self.method.apply(replace(group, weights=weights), statistic)
