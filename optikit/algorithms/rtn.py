"""Round to nearest: the closest code for every weight, no data. The baseline of everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from optikit.algorithms.grid import Grid, Quantized, Scales, fit


def nearest(weight: Tensor, grid: Grid, chosen: Scales) -> Quantized:
    """Code every weight (rows, columns) as the closest point of its group's grid."""
    rows, columns = weight.shape
    scales, zeros = chosen
    groups = weight.reshape(rows, scales.shape[1], -1)
    codes = (groups / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, grid.qmax)
    return Quantized(codes.byte().reshape(rows, columns), scales.half(), zeros.byte())


def quantize(weight: Tensor, grid: Grid, mask: Tensor | None = None) -> Quantized:
    """Quantize a weight (rows, columns) float32 by rounding.

    Args:
        weight: (rows, columns) float32.
        grid: Bits, group size, symmetry, search.
        mask: (rows, columns) bool: False holds a weight at exactly zero; None prunes nothing.

    Raises:
        ValueError: The group size doesn't divide the columns.
    """
    return masked(nearest(weight, grid, fit(weight, grid)), mask)


def masked(quantized: Quantized, mask: Tensor | None) -> Quantized:
    """Return codes that stand for zero wherever `mask` is False."""
    if mask is None:
        return quantized
    size = mask.shape[1] // quantized.zeros.shape[1]
    zeros = quantized.zeros.repeat_interleave(size, 1)
    return quantized._replace(codes=torch.where(mask, quantized.codes, zeros))
