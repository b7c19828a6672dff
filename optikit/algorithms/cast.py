"""Casting: floats in another 16-bit format, and what doesn't fit into it.

Paper   none; IEEE 754-2019, section 4.3.1 (ties to even); bfloat16: Kalamkar et al. 2019, arXiv:1905.12322
Cost    one pass over the weights
Differs nothing
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cast(NamedTuple):
    """Floats in another dtype.

    Attributes:
        values: The same shape, finite.
        overflowed: How many were too large, and are the largest now.
        vanished: How many weren't zero, and are now.
        largest: Largest magnitude before.
    """

    values: Tensor
    overflowed: int
    vanished: int
    largest: float


def cast(tensor: Tensor, dtype: torch.dtype) -> Cast:
    """Round finite floats of any shape to a dtype, ties to even; what is too large saturates."""
    values = tensor.to(dtype)
    infinite = torch.isinf(values)
    overflowed = int(infinite.sum())
    if overflowed:
        most = torch.finfo(dtype).max
        values = torch.where(infinite, torch.copysign(torch.full_like(values, most), values), values)
    vanished = int(((values == 0) & (tensor != 0)).sum())
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return Cast(values, overflowed, vanished, largest)
