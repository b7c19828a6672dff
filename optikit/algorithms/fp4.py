"""FP4: weights rounded to E2M1, two bits of exponent and one of mantissa, a scale to 16 or 32 inputs of an output.

Paper   NVFP4: NVIDIA 2025, arXiv:2509.25149, section 2; MXFP4: Rouhani et al. 2023, arXiv:2310.10537, section 2, and
        OCP Microscaling Formats 1.0, section 6.3; scales below the largest weight: Cook et al. 2025, arXiv:2512.02010
Cost    one pass over the weights, and one more for every scale that is tried
Differs MXFP4's exponent rounds up where the largest weight would land beyond 7, as compressed-tensors does it, and not
        always down as in the paper: the largest of a group loses a seventh at most instead of a quarter
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What codes 0 … 7 stand for; 8 … 15 are their negatives."""
LARGEST, LARGEST_SCALE = LEVELS[-1], 448.0
NVFP4_GROUP, MXFP4_GROUP = 16, 32
"""Inputs that share a scale."""
BIAS = 127
"""Of an exponent of MXFP4."""
NO_SCALE = 0.125
"""Scale of an NVFP4 group whose own is zero: whatever it is, its weights are all rounded to zero."""
RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 2 / 3)
"""Where the largest weight of an NVFP4 group may land, as a share of the largest code: down to 4, below which the same
codes come again at half the scale."""
SHIFTS = (0, -1)
"""By how much an exponent of MXFP4 may differ from the usual one: lowered, it cuts the largest weight off and has twice
the precision for the others. Raised, it never gains: the same codes come again."""


def quantize(weight: Tensor, steps: Tensor) -> Tensor:
    """Return the codes of a weight: nearest, ties to even codes, saturating; below zero the sign is kept.

    Args:
        weight: (…, n) float32.
        steps: What code 1.0 stands for, of a shape that spreads to it.

    Returns:
        (…, n) uint8, 0 … 15.
    """
    scaled = weight / steps
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(LEVELS)], device=scaled.device)
    magnitude = scaled.abs()
    down = torch.bucketize(magnitude, middles, out_int32=True)
    up = torch.bucketize(magnitude, middles, out_int32=True, right=True)
    codes = torch.where(down % 2 == 0, down, up).to(torch.uint8)
    return codes | (scaled < 0).to(torch.uint8) << 3


def dequantize(codes: Tensor, steps: Tensor) -> Tensor:
    """Return what codes (…, n) and steps that spread to their shape stand for, float32."""
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)], device=codes.device)
    return levels[codes.int()] * steps


def global_scale(absmax: Tensor) -> Tensor:
    """Return what NVFP4 scales are multiplied by before they are rounded, (1,): the largest becomes the largest E4M3.

    Args:
        absmax: () ≥ 0, largest magnitude of a linear, or of all that are multiplied as one matrix.
    """
    found = LARGEST_SCALE * LARGEST / absmax.float().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(torch.isfinite(found), found, 1.0).reshape(1)


def nvfp4(weight: Tensor, common: Tensor, *, search: bool = False) -> tuple[Tensor, Tensor]:
    """Round some outputs to NVFP4.

    Args:
        weight: (rows, columns) float32; groups of 16 divide the columns.
        common: (1,), see `global_scale`.
        search: Choose each scale by squared error among `RATIOS`.

    Returns:
        Codes (rows, columns) uint8, scales (rows, columns / 16) float8_e4m3fn.
    """
    groups = weight.view(len(weight), -1, NVFP4_GROUP)
    whole = common * (groups.abs().amax(dim=-1) / LARGEST)
    tried = [_e4m3(whole / ratio) for ratio in (RATIOS if search else RATIOS[:1])]
    scales = _best(groups, tried, [(each.float() / common) for each in tried])
    return quantize(groups, (scales.float() / common).unsqueeze(-1)).flatten(-2), scales


def mxfp4(weight: Tensor, *, search: bool = False) -> tuple[Tensor, Tensor]:
    """Round some outputs to MXFP4.

    Args:
        weight: (rows, columns) float32; groups of 32 divide the columns.
        search: Choose each exponent by squared error among those of `SHIFTS`.

    Returns:
        Codes (rows, columns) uint8, exponents (rows, columns / 32) uint8, biased by 127.
    """
    groups = weight.view(len(weight), -1, MXFP4_GROUP)
    bits = groups.abs().amax(dim=-1).view(torch.int32)
    usual = ((bits + (1 << 21)) >> 23) - 2  # 2^(e - 2): a magnitude of 1.75 · 2^e and more counts as the next power
    tried = [(usual + shift).clamp(0, 2 * BIAS).to(torch.uint8) for shift in (SHIFTS if search else SHIFTS[:1])]
    exponents = _best(groups, tried, [_powers(each) for each in tried])
    return quantize(groups, _powers(exponents).unsqueeze(-1)).flatten(-2), exponents


def _e4m3(scales: Tensor) -> Tensor:
    rounded = scales.clamp_max(LARGEST_SCALE).to(E4M3)
    return torch.where(rounded.float() == 0, NO_SCALE, rounded.float()).to(E4M3)


def _powers(exponents: Tensor) -> Tensor:
    return torch.exp2(exponents.float() - BIAS)


def _best(groups: Tensor, tried: list[Tensor], steps: list[Tensor]) -> Tensor:
    """Return of each group (rows, groups) the scale with the least squared error; of equals the first."""
    if len(tried) == 1:
        return tried[0]
    least, best = tried[0].clone(), torch.full(groups.shape[:-1], torch.inf, device=groups.device)
    for scales, step in zip(tried, steps, strict=True):
        spread = step.unsqueeze(-1)
        error = dequantize(quantize(groups, spread), spread).sub_(groups).square_().sum(dim=-1)
        better = error < best
        best = torch.where(better, error, best)
        least = torch.where(better, scales.float(), least.float()).to(scales.dtype)
    return least
