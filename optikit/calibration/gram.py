"""The Gram matrix of a group's inputs, mean of x xᵀ over tokens: the Hessian of GPTQ and SparseGPT."""

from __future__ import annotations

import torch
from torch import Tensor

from optikit.algorithms.precision import exact_products
from optikit.calibration import distributed
from optikit.calibration.method import Group, Seen

STRIP = 192
"""Columns per strip: only strips on and above the diagonal are computed, which saves nearly half of the products."""


class Gram:
    """Sums x xᵀ in float32.

    Args:
        width: Input features.
        device: Where to sum.
    """

    def __init__(self, width: int, device: str) -> None:
        self._sum = torch.zeros((width, width), device=device)
        self._mean: Tensor | None = None
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add (tokens, width) inputs."""
        with exact_products(inputs.dtype):
            self._add(inputs.float())

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
    """The Gram matrix, and what a group's outputs lack to be those of the dense model.

    Args:
        group: The linears.
    """

    def __init__(self, group: Group) -> None:
        weight = group.weights[0]
        super().__init__(group.width, str(weight.device))
        self._weights = group.weights
        self._cross: Tensor | None = None
        self._of_outputs = False

    def see(self, seen: Seen) -> None:
        """Add a batch."""
        wide = seen.inputs.float()
        gap = seen.dense_inputs - wide
        self._of_outputs = seen.behind is not None
        with exact_products(seen.inputs.dtype):
            self._add(wide)
            if seen.behind is not None:
                gap = torch.addmm(seen.behind, gap, self._weights[0].T)
            if self._cross is None:
                self._cross = torch.zeros((gap.shape[1], wide.shape[1]), device=wide.device)
            self._cross.addmm_(gap.T, wide)

    def merge(self) -> None:
        """Add what the other processes have seen."""
        super().merge()
        if self._cross is not None:
            distributed.total(self._cross)

    def lacking(self) -> Tensor:
        """Return the mean of (wanted output - present output) xᵀ of the stacked linears, (out, in) float32; once."""
        if self._cross is None:
            raise ValueError("no batch was seen")
        mean, self._cross = self._cross.div_(max(self.tokens, 1)), None
        return mean if self._of_outputs else torch.cat(self._weights) @ mean
