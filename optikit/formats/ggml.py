"""Blocks of ggml, exactly as far as integer grids go: what a quantizer chose is what llama.cpp reads.

A block holds 32 weights of a row; d is a float16, and m, too:

    Q4_0   d, 16 bytes             weight = (code - 8) · d        byte j: code j in its low half, j + 16 in its high one
    Q4_1   d, m, 16 bytes          weight = code · d + m
    Q5_0   d, 4 bytes, 16 bytes    weight = (code - 16) · d       bit j of the four: the fifth bit of code j
    Q8_0   d, 32 signed bytes      weight = code · d

A symmetric 4-bit grid is Q4_0, and an asymmetric one Q4_1 where every -zero · scale is a float16. Where it isn't, Q5_0
has room: code - zero lies within -15 … 14. A group of 64 or 128 weights is several blocks that repeat its scale.
Scales here are float16 from the start (`algorithms/grid.py`), so nothing is rounded on the way.
Source: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
"""Weights of a block."""


class Grid(NamedTuple):
    """A quantized weight: codes (out, in) uint8, scales (out, groups), zero points (out, groups)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def rows(self, order: Tensor) -> Grid:
        """Return it with its rows in another order."""
        return Grid(*(each[order] for each in self))


def exact_type(scales: Tensor, zeros: Tensor, *, bits: int, columns: int) -> str | None:
    """Return the type whose blocks stand for a grid's very weights, or None.

    Args:
        scales: (out, groups) float.
        zeros: (out, groups), whole numbers 0 … 2^bits - 1.
        bits: Bits per code.
        columns: Weights of a row.
    """
    groups = scales.shape[1]
    halves = scales.to(torch.float16).float()
    if columns % groups or columns // groups % BLOCK or not torch.equal(halves, scales.float()):
        return None
    middle = bool((zeros == 1 << (bits - 1)).all())
    if bits == 8:
        return "Q8_0" if middle else None
    if bits != 4:
        return None
    if middle:
        return "Q4_0"
    lowest = -zeros.float() * halves
    return "Q4_1" if torch.equal(lowest.to(torch.float16).float(), lowest) else "Q5_0"


def pack(grid: Grid, kind: str) -> Tensor:
    """Pack a grid in blocks of the type that `exact_type` told: (out, bytes of a row) uint8."""
    rows, columns = grid.codes.shape
    repeats = columns // grid.scales.shape[1] // BLOCK
    scales, zeros = (each.repeat_interleave(repeats, 1) for each in (grid.scales.to(torch.float16), grid.zeros))
    codes = grid.codes.reshape(rows, -1, BLOCK)
    parts = [_bytes(scales)]
    if kind == "Q4_1":
        parts += [_bytes((-zeros.float() * scales.float()).to(torch.float16)), _halves(codes)]
    elif kind == "Q5_0":
        shifted = codes.to(torch.int16) - zeros.to(torch.int16)[..., None] + 16
        parts += [_fifths(shifted), _halves((shifted & 15).to(torch.uint8))]
    elif kind == "Q8_0":
        parts.append((codes.to(torch.int16) - 128).to(torch.int8).view(torch.uint8))
    else:
        parts.append(_halves(codes))
    return torch.cat(parts, -1).reshape(rows, -1)


def _bytes(halves: Tensor) -> Tensor:
    """Return float16 (rows, blocks) as bytes (rows, blocks, 2)."""
    return halves.contiguous()[..., None].view(torch.uint8)


def _halves(codes: Tensor) -> Tensor:
    """Pack 4-bit codes (rows, blocks, 32) to bytes (rows, blocks, 16)."""
    return codes[..., :16] | codes[..., 16:] << 4


def _fifths(codes: Tensor) -> Tensor:
    """Gather the fifth bits of codes (rows, blocks, 32) in bytes (rows, blocks, 4), the first in the lowest."""
    bits = (codes >> 4).to(torch.uint8).reshape(*codes.shape[:-1], 4, 8)
    weights = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def paired(rows: int, heads: int) -> Tensor:
    """Return the order in which llama.cpp wants rows of a query or key matrix of llama's family.

    transformers turns channel i of a head together with i + width / 2, llama.cpp neighbours.
    """
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)
