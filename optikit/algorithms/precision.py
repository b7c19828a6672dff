"""Which dtype the walk computes in: decided by the processor's instruction sets, never by a stopwatch.

Activations and block weights are bfloat16 where the processor multiplies bfloat16 in hardware, else float32. Sums of
products (Hessians) are float32 either way: of bfloat16 inputs every product is exact in float32, so telling oneDNN
that it may multiply in bfloat16 changes nothing but the speed (3x on AVX512-BF16, 2x on AMX).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from optikit import host

BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
ROWS = 64
"""Rows that products of any number of tokens are filled up to a multiple of: oneDNN compiles one for every shape that
it sees, and keeps the last thousand, some of a hundred kilobytes. Experts have as many shapes as numbers of tokens."""


def compute_dtype(device: str) -> torch.dtype:
    """Return the dtype of activations and block weights on a device."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if BF16_INSTRUCTIONS.intersection(host.isa()) else torch.float32


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 matrix products of values that came from bfloat16 run on bfloat16 (CPU) or TF32 (CUDA) units."""
    if dtype is not torch.bfloat16:
        yield
        return
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]  # set at import
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = "bf16", "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


def filled_up(rows: Tensor) -> Tensor:
    """Return rows (n, width) with rows of zeros after them, up to a multiple of `ROWS`."""
    lacking = -len(rows) % ROWS
    return functional.pad(rows, (0, 0, 0, lacking)) if lacking else rows
