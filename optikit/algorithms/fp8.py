"""FP8: weights and activations rounded to E4M3, four bits of exponent and three of mantissa, a scale to a region.

Paper   Micikevicius et al. 2022, arXiv:2209.05433, section 3 (E4M3: largest 448, no infinities, subnormals down to
        2^-9); blocks of 128 x 128 weights and 1 x 128 activations: DeepSeek-V3, arXiv:2412.19437, section 3.3.2
Cost    one pass over the weights, and one more for every scale that is tried
Differs values beyond the largest saturate, as they do in every server; the paper leaves that open
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest magnitude of a code."""
LARGEST_ON_NEURON = 240.0
"""The same on AWS Neuron, whose E4M3 keeps the highest exponent for infinities and NaN."""
BLOCK = 128
"""Rows and columns of a block; columns of an activation's block."""
SMALLEST_STEP = 2.0**-9
"""Distance of codes next to zero."""
RATIOS = (1.0, 0.93, 0.87, 0.81, 0.76, 0.71, 0.66, 0.62, 0.58, 0.54)
"""Where the largest weight of a region may land, as a share of the largest code: an octave, as a step in mantissas
changes with an octave only. What lands lower keeps all of its precision and leaves room unused at the top, which costs
bits of the smallest weights alone."""


def quantize(weight: Tensor, scales: Tensor, largest: float = LARGEST) -> Tensor:
    """Return the codes of a weight: ties to even, saturating.

    Args:
        weight: (rows, columns) in any float dtype.
        scales: Of the same shape, or one that spreads to it.
        largest: Largest magnitude of a code.

    Returns:
        (rows, columns) float8_e4m3fn.
    """
    return (weight.float() / scales.float()).clamp_(-largest, largest).to(E4M3)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return what codes (rows, columns) and scales that spread to their shape stand for, float32."""
    return codes.float() * scales.float()


def spread(scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the scales of blocks, (ceil(rows / 128), ceil(columns / 128)), as one for each weight of a shape."""
    rows, columns = shape
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def of_absmax(absmax: Tensor, dtype: torch.dtype = torch.float32, largest: float = LARGEST) -> Tensor:
    """Return the scales at which the largest magnitudes land on the largest code; 1 for what is all zero.

    Args:
        absmax: Of each region, any shape, ≥ 0.
        dtype: What scales are stored in: the result is exact in it.
        largest: Largest magnitude of a code.
    """
    scales = (absmax.float() / largest).to(dtype)
    smallest = torch.finfo(dtype).smallest_normal
    return torch.where(absmax > 0, scales.clamp_min(smallest), torch.ones_like(scales))


def channel_absmax(weight: Tensor) -> Tensor:
    """Return the largest magnitude of each row of a weight (rows, columns): (rows, 1) float32."""
    return weight.float().abs().amax(dim=1, keepdim=True)


def block_absmax(weight: Tensor) -> Tensor:
    """Return the largest magnitude of each block of a weight: (ceil(rows / 128), ceil(columns / 128)) float32."""
    return _blocks(weight.float().abs()).amax(dim=(1, 3))


def search_channels(weight: Tensor, absmax: Tensor, dtype: torch.dtype, largest: float = LARGEST) -> Tensor:
    """Return the scale of each row with the least squared error, of those of `RATIOS`.

    Args:
        weight: (rows, columns) float32.
        absmax: (rows, 1).
        dtype: What scales are stored in.
        largest: Largest magnitude of a code.
    """
    tried = [of_absmax(absmax / ratio, dtype, largest) for ratio in RATIOS]
    errors = [_squared(weight, scales, largest).sum(dim=1, keepdim=True) for scales in tried]
    return _best(tried, errors)


def search_blocks(weight: Tensor, absmax: Tensor, largest: float = LARGEST) -> Tensor:
    """Return the scale of each block with the least squared error, as `search_channels` does."""
    shape = (weight.shape[0], weight.shape[1])
    tried = [of_absmax(absmax / ratio, largest=largest) for ratio in RATIOS]
    errors = [_blocks(_squared(weight, spread(scales, shape), largest)).sum(dim=(1, 3)) for scales in tried]
    return _best(tried, errors)


def _squared(weight: Tensor, scales: Tensor, largest: float) -> Tensor:
    return dequantize(quantize(weight, scales, largest), scales).sub_(weight).square_()


def _best(tried: list[Tensor], errors: list[Tensor]) -> Tensor:
    """Return of each region the scale with the least error; of equals the first."""
    least = torch.stack(errors).argmin(dim=0, keepdim=True)
    return torch.stack(tried).gather(0, least)[0]


def _blocks(weight: Tensor) -> Tensor:
    """Return a weight cut into blocks, filled up with zeros: (block rows, 128, block columns, 128)."""
    rows, columns = weight.shape
    whole = pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return whole.view(whole.shape[0] // BLOCK, BLOCK, whole.shape[1] // BLOCK, BLOCK)


def round_tokens(inputs: Tensor, block: int | None = None) -> Tensor:
    """Return what an FP8 kernel sees of its inputs (…, in): each token, or each 128 of it, with a scale of its own.

    Args:
        inputs: In any float dtype, which the result has, too.
        block: Channels that share a scale; None is all of them.
    """
    regions = inputs.float().reshape(*inputs.shape[:-1], -1, block or inputs.shape[-1])
    scales = (regions.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_min(1 / (LARGEST * 512))
    return dequantize(quantize(regions, scales), scales).flatten(-2).to(inputs.dtype)


def round_inputs(inputs: Tensor, scale: Tensor) -> Tensor:
    """Return what an FP8 kernel sees of its inputs (…, in) with one scale (), fixed beforehand: saturated beyond."""
    return dequantize(quantize(inputs, scale), scale).to(inputs.dtype)
