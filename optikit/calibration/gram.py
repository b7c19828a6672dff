"""The Gram matrix of a group's inputs, mean of x xᵀ over tokens: the Hessian of GPTQ and SparseGPT."""

from __future__ import annotations

import torch
from torch import Tensor

from optikit.algorithms.correction import corrected
from optikit.algorithms.precision import exact_products
from optikit.calibration import distributed
from optikit.calibration.method import Batch, Group

STRIP = 192
"""Columns per strip: only strips on and above the diagonal are computed, which saves nearly half of the products."""


class Gram:
    """Sums x xᵀ in float32.

    Args:
        group: The linears that see the inputs.
    """

    def __init__(self, group: Group) -> None:
        self._sum = torch.zeros((group.width, group.width), device=group.weights[0].device)
        self._mean: Tensor | None = None
        self.tokens = 0

    def update(self, batch: Batch) -> None:
        """Add a batch's inputs."""
        with exact_products(batch.inputs.dtype):
            self._add(batch.inputs.float())

    def _add(self, wide: Tensor) -> None:
        for start in range(0, len(self._sum), STRIP):
            strip = wide[:, start : start + STRIP]
            self._sum[start : start + STRIP, start:].addmm_(strip.T, wide[:, start:])
        self.tokens += len(wide)

    def merge(self) -> None:
        """Add what the other processes have seen."""
        distributed.total(self._sum)
        self.tokens = int(distributed.total(torch.tensor(self.tokens, device=self._sum.device)))

    def mean(self) -> Tensor:
        """Return the mean of x xᵀ, (width, width) float32, exactly symmetric; it takes the place of the sum."""
        if self._mean is not None:
            return self._mean
        for start in range(0, len(self._sum), STRIP):
            stop = start + STRIP
            diagonal = self._sum[start:stop, start:stop]
            diagonal.copy_(torch.triu(diagonal) + torch.triu(diagonal, 1).T)
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
        self._mean = self._sum.div_(max(self.tokens, 1))
        return self._mean


class PairedGram(Gram):
    """The Gram matrix, and the error of a group's outputs against the dense model's.

    Args:
        group: The linears.
        damp: Holds the correction back, as a fraction of the Gram matrix's mean diagonal.
    """

    def __init__(self, group: Group, damp: float) -> None:
        super().__init__(group)
        self._weights = group.weights
        self._damp = damp
        self._cross: Tensor | None = None
        self._of_outputs = False

    def update(self, batch: Batch) -> None:
        """Add a batch: its inputs, and how far they are from the dense model's."""
        wide = batch.inputs.float()
        gap = batch.dense_inputs - wide
        self._of_outputs = batch.residual_gap is not None
        with exact_products(batch.inputs.dtype):
            self._add(wide)
            if batch.residual_gap is not None:
                gap = torch.addmm(batch.residual_gap, gap, self._weights[0].T)
            if self._cross is None:
                self._cross = torch.zeros((gap.shape[1], wide.shape[1]), device=wide.device)
            self._cross.addmm_(gap.T, wide)

    def merge(self) -> None:
        """Add what the other processes have seen."""
        super().merge()
        if self._cross is not None:
            distributed.total(self._cross)

    def lacking(self) -> Tensor:
        """Return the mean of (dense output - present output) xᵀ, (out, in) float32 of all linears; callable once."""
        if self._cross is None:
            raise ValueError("no batch was seen")
        mean, self._cross = self._cross.div_(max(self.tokens, 1)), None
        return mean if self._of_outputs else torch.cat(self._weights) @ mean

    def corrected(self) -> Tensor:
        """Return stacked weights (out, in) float32, corrected towards the dense model's outputs; callable once."""
        hessian, lacking = self.mean(), self.lacking()
        return corrected(torch.cat(self._weights), hessian, lacking, damp=self._damp, tokens=self.tokens)


def gram_of(group: Group, correct_damp: float | None) -> Gram:
    """Return an empty Gram matrix; with a damping, a paired one."""
    return Gram(group) if correct_damp is None else PairedGram(group, correct_damp)
