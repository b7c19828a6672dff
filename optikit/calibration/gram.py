"""The Gram matrix of a group's inputs, mean of x xᵀ over tokens: the Hessian of GPTQ and SparseGPT."""

from __future__ import annotations

import torch
from torch import Tensor

from optikit.calibration.arithmetic import exact_products

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
        self._tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add (tokens, width) inputs."""
        wide = inputs.float()
        with exact_products(inputs.dtype):
            for start in range(0, len(self._sum), STRIP):
                strip = wide[:, start : start + STRIP]
                self._sum[start : start + STRIP, start:].addmm_(strip.T, wide[:, start:])
        self._tokens += len(inputs)

    def mean(self) -> Tensor:
        """Return the mean of x xᵀ, (width, width) float32, exactly symmetric."""
        upper = torch.triu(self._sum)
        full: Tensor = (upper + torch.triu(upper, 1).T) / max(self._tokens, 1)
        return full
