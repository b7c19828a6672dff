"""NF4: weights rounded to sixteen quantiles of a normal distribution, a scale per block of consecutive weights.

Paper   Dettmers et al. 2023, arXiv:2305.14314, section 3 (4-bit NormalFloat, double quantization)
Cost    one pass over the weights, a few million of them at a time
Differs block constants are rounded to the nearest 8-bit value, as bitsandbytes does on CUDA; its CPU kernel looks them
        up in a table of 65,536 entries and takes a neighbour for one constant in five hundred
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
"""Weights in a row of memory that share a constant."""
CONSTANTS_BLOCK = 256
"""Constants that share a constant of their own, where they are quantized again."""
ZERO = 7
"""The code of 0."""
CHUNK = 1 << 22
"""Weights at a time: a whole number of blocks."""
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What codes 0 … 15 stand for, in units of the largest magnitude of a block. Source: the paper's appendix E."""
HALF_GAP = max(upper - lower for lower, upper in pairwise(LEVELS)) / 2
"""How far a weight can be from its level, in the same units."""


@dataclass(frozen=True)
class Constants:
    """The largest magnitudes of blocks, themselves in 8 bits: `map[codes] · scales + offset`, 256 to a scale.

    Attributes:
        codes: (blocks,) uint8.
        scales: (ceil(blocks / 256),) float32.
        offset: () float32, the mean of what they stand for.
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to NF4.

    Args:
        weight: Of any shape; blocks run over its elements in the order of memory.

    Returns:
        Codes (elements,) uint8 in 0 … 15, and the largest magnitude of each block, (blocks,) float32.
    """
    flat = weight.reshape(-1)
    parts = [_rounded(part.float(), _midpoints(weight.device)) for part in torch.split(flat, CHUNK)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([absmax for _, absmax in parts])


def _rounded(flat: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    blocks = pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    relative = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(relative.clamp_(-1, 1), midpoints, out_int32=True)
    return codes.view(-1)[: len(flat)].to(torch.uint8), absmax


def dequantize(codes: Tensor, absmax: Tensor) -> Tensor:
    """Return the weights (elements,) float32 that codes (elements,) and constants (blocks,) stand for."""
    levels = torch.tensor(LEVELS, device=codes.device)
    spread = absmax.repeat_interleave(BLOCK)[: len(codes)]
    return levels[codes.int()] * spread


def quantize_constants(absmax: Tensor) -> Constants:
    """Round the constants of blocks, (blocks,) float32, to 8 bits each: 0.127 bits per weight instead of 0.5."""
    offset = absmax.mean()
    blocks = pad(absmax - offset, (0, -len(absmax) % CONSTANTS_BLOCK)).view(-1, CONSTANTS_BLOCK)
    scales = blocks.abs().amax(dim=1)
    relative = (blocks * (1.0 / scales.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    levels = dynamic_map().to(absmax.device)
    codes = torch.bucketize(relative, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return Constants(codes.view(-1)[: len(absmax)].to(torch.uint8), scales, offset)


def dequantize_constants(constants: Constants) -> Tensor:
    """Return the constants of blocks, (blocks,) float32."""
    levels = dynamic_map().to(constants.codes.device)
    spread = constants.scales.repeat_interleave(CONSTANTS_BLOCK)[: len(constants.codes)]
    return levels[constants.codes.int()] * spread + constants.offset


def _midpoints(device: torch.device) -> Tensor:
    levels = torch.tensor(LEVELS, device=device)
    return (levels[:-1] + levels[1:]) / 2


@cache
def dynamic_map() -> Tensor:
    """Return the 256 values of the signed 8-bit dynamic type, ascending: (256,) float32.

    Seven decades, each with twice the values of the one below. Source: Dettmers 2015, arXiv:1511.04561, section 2.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
