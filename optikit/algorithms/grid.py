"""Integer grids: a scale and a zero point for every group of weights in a row.

A weight w of group g is coded as q = clamp(round(w / s_g) + z_g, 0, 2^bits - 1) and stands for (q - z_g) · s_g.

Symmetric grids have z = 2^(bits - 1) and one more code below zero than above it. The scale here carries a sign, so that
the side with the extra code is the side of the group's largest weight: that is worth half a level of range, for free.
Scales are rounded to float16, as they are stored, *before* codes are chosen: what was chosen is what is read back.

Nested grids (Lin et al. 2024, QServe, arXiv:2405.04532: progressive quantization) make every scale of a row a whole
multiple k of one scale of that row, so that k · (q - z) is a code of 8 bits with one scale per row: the same weight,
bit for bit, to kernels that know no groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16; a scale of zero would divide by zero in loaders."""
LARGEST_SCALE = 65504.0
CLIP_RATIOS = (0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
"""Symmetric: the largest weight lands on code -ratio · 2^(bits-1). Twenty ratios are no better than these six."""
SPAN_RATIOS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
"""Asymmetric: share of the span from minimum to maximum that the codes cover."""
PRUNED_SHARE = 0.25
"""Share of exact zeros from which on a weight counts as pruned, and its zeros are held."""
CHUNK_ELEMENTS = 1 << 16
"""Weights searched together: a handful of buffers of this size fit into a core's cache."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """An integer grid.

    Attributes:
        bits: Bits per code.
        group_size: Weights of a row that share a scale; -1 for the whole row.
        sym: Zero points fixed in the middle.
        search: Search scales for the least squared error, instead of spanning minimum to maximum.
        nested: Scales of a row are whole multiples of one another's common scale; see the module.
    """

    bits: int
    group_size: int
    sym: bool
    search: bool = True
    nested: bool = False

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def width(self, columns: int) -> int:
        """Return the weights of a group in rows of `columns`.

        Raises:
            ValueError: The group size doesn't divide the row.
        """
        size: int = columns if self.group_size < 0 else self.group_size
        if columns % size:
            raise ValueError(f"group_size {size} does not divide {columns} columns")
        return size


class Scales(NamedTuple):
    """Scales and zero points, (rows, groups) float32; scales are float16 values, zero points whole numbers ≥ 1."""

    scales: Tensor
    zeros: Tensor


class Quantized(NamedTuple):
    """A quantized weight.

    Attributes:
        codes: (rows, columns) uint8.
        scales: (rows, groups) float16.
        zeros: (rows, groups) uint8.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor


class Rounded(NamedTuple):
    """A quantized weight, with facts about its rounding.

    Attributes:
        quantized: Codes, scales, zero points.
        facts: As JSON.
    """

    quantized: Quantized
    facts: Mapping[str, Any]


def stored_scale(scale: Tensor) -> Tensor:
    """Round scales to what float16 can hold, never to zero or infinity; the sign stays."""
    magnitude = scale.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.copysign(magnitude, scale).half().float()


def most_multiple(bits: int, *, sym: bool) -> int:
    """Return the largest whole number that takes any code of a grid, zero point off, to at most 127.

    >>> most_multiple(4, sym=True), most_multiple(4, sym=False)
    (15, 8)
    """
    return 127 // ((1 << (bits - 1)) if sym else (1 << bits) - 1)


def nest(scales: Tensor, most: int) -> Tensor:
    """Return the nearest scales that are whole multiples, 1 to `most`, of one scale per row.

    That scale has 7 significant bits, so float16, of 11, holds every multiple up to 15 exactly.

    Args:
        scales: (rows, groups) float32, of either sign.
        most: Largest multiple.
    """
    mantissa, exponent = torch.frexp(scales.abs().amax(1, keepdim=True) / most)
    base = torch.ldexp(torch.ceil(mantissa * 128) / 128, exponent).clamp_min(SMALLEST_SCALE)
    base = torch.ceil(base / SMALLEST_SCALE) * SMALLEST_SCALE  # below 2^-14 float16 knows multiples of 2^-24 only
    return torch.copysign(torch.round(scales.abs() / base).clamp(1, most) * base, scales)


def minmax(groups: Tensor, grid: Grid) -> Scales:
    """Return the grid that spans each group from its minimum to its maximum.

    Args:
        groups: (rows, groups, group size) float32.
        grid: Bits and symmetry.
    """
    if grid.sym:
        half = 2 ** (grid.bits - 1)
        scales = stored_scale(groups.abs().amax(-1) * (2 / grid.qmax))
        return Scales(scales, torch.full_like(scales, half))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = stored_scale((high - low) / grid.qmax)
    # Zero points start at 1: the gptq format stores them minus one, and loaders disagree on what 0 becomes.
    return Scales(scales, torch.round(-low / scales).clamp(1, grid.qmax))


def fit(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Scales:
    """Choose scales and zero points.

    Args:
        weight: (rows, columns) float32.
        grid: Bits, group size, symmetry, search.
        importance: (columns,) > 0: what a squared error in that column costs; all the same if None.
    """
    found = _fit(weight, grid, importance)
    return found._replace(scales=nest(found.scales, most_multiple(grid.bits, sym=grid.sym))) if grid.nested else found


def _fit(weight: Tensor, grid: Grid, importance: Tensor | None) -> Scales:
    rows, columns = weight.shape
    size = grid.width(columns)
    groups = weight.reshape(rows, columns // size, size)
    if not grid.search:
        return minmax(groups, grid)
    cost = torch.ones(columns, device=weight.device) if importance is None else importance / importance.mean()
    cost = cost.reshape(1, columns // size, size)
    search = _search_symmetric if grid.sym else _search_asymmetric
    found = [search(part, cost, grid) for part in torch.split(groups, max(1, CHUNK_ELEMENTS // columns))]
    return Scales(torch.cat([part.scales for part in found]), torch.cat([part.zeros for part in found]))


class _Best:
    """Keeps, per group, the candidate that explains most of the weights' squared norm.

    For given codes q (zero point taken off) the best scale is s = Σcwq / Σcq², and it removes (Σcwq)² / Σcq² of Σcw².
    """

    def __init__(self, groups: Tensor, cost: Tensor) -> None:
        self._cost, self._costed = cost, groups * cost
        shape = groups.shape[:-1]
        self._gain = torch.full(shape, -1.0, device=groups.device)
        self.scales = torch.full(shape, SMALLEST_SCALE, device=groups.device)
        self.zeros = torch.ones(shape, device=groups.device)

    def offer(self, codes: Tensor, zeros: Tensor) -> None:
        """Offer codes (rows, groups, size) with their zero points (rows, groups)."""
        along = (codes * self._costed).sum(-1)
        norm = (codes.square_() * self._cost).sum(-1)
        gain = torch.where(norm > 0, along.square() / norm, 0.0)
        better = gain > self._gain
        self._gain = torch.where(better, gain, self._gain)
        self.scales = torch.where(better, along / norm.clamp_min(1e-30), self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)


def _search_symmetric(groups: Tensor, cost: Tensor, grid: Grid) -> Scales:
    half = 2 ** (grid.bits - 1)
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    best = _Best(groups, cost)
    zeros = torch.full_like(peak, half)
    # The largest weight lands on code -ratio·half: below 1 the lowest codes stay empty, above 1 it is clipped.
    for ratio in CLIP_RATIOS:
        inverse = torch.where(peak == 0, 0.0, -ratio * half / peak)
        codes = (groups * inverse[..., None]).round_().clamp_(-half, half - 1)
        best.offer(codes, zeros)
    return Scales(stored_scale(best.scales), zeros)


def _search_asymmetric(groups: Tensor, cost: Tensor, grid: Grid) -> Scales:
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = _Best(groups, cost)
    for ratio in SPAN_RATIOS:
        scales = ((high - low) * (ratio / grid.qmax)).clamp_min(SMALLEST_SCALE)
        zeros = torch.round(-low * ratio / scales).clamp_(1, grid.qmax)
        codes = (groups / scales[..., None]).round_()
        codes = torch.maximum(torch.minimum(codes, (grid.qmax - zeros)[..., None]), -zeros[..., None])
        best.offer(codes, zeros)
    return Scales(stored_scale(best.scales), best.zeros)


def pruned_mask(weight: Tensor) -> Tensor | None:
    """Return which weights are alive where a weight was pruned (a quarter of it is exactly zero), else None."""
    alive = weight != 0
    return alive if alive.float().mean().item() <= 1 - PRUNED_SHARE else None


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return the weight (rows, columns) float32 that codes stand for."""
    rows, columns = codes.shape
    grouped = codes.float().reshape(rows, scales.shape[1], -1)
    return ((grouped - zeros.float()[..., None]) * scales.float()[..., None]).reshape(rows, columns)
