"""INT8 arithmetic: weights rounded once with a scale per output channel, activations as they come, per token.

Paper   Dettmers et al. 2022, arXiv:2208.07339, section 3.1 (vector-wise quantization)
Cost    one pass over the weights
Differs zero points are always 0 and codes span -127 … 127, as int-quantized checkpoints and their kernels want them
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127


def scales_of(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the scale of each row of a weight (out, in): (out, 1), positive, exact in `dtype`."""
    absmax = weight.float().abs().amax(dim=1, keepdim=True)
    scales = (absmax / LEVELS).to(dtype)
    smallest = torch.finfo(dtype).tiny  # of a row of zeros
    return torch.where(scales > 0, scales, smallest)


def quantize(weight: Tensor, scales: Tensor) -> Tensor:
    """Return the codes of a weight: (out, in) float and (out, 1) → (out, in) int8 in -127 … 127."""
    return torch.round(weight.float() / scales.float()).clamp_(-LEVELS, LEVELS).to(torch.int8)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the weight (out, in) float32 that codes and scales stand for."""
    return codes.float() * scales.float()


def round_trip(weight: Tensor) -> Tensor:
    """Return what is left of a weight (out, in) after rounding it with one scale per row."""
    scales = scales_of(weight)
    return dequantize(quantize(weight, scales), scales)


def round_tokens(inputs: Tensor) -> Tensor:
    """Return what an INT8 kernel sees of its inputs (tokens, in): each token rounded with a scale of its own."""
    return round_trip(inputs)
