"""Depth pruning: how much each decoder block changes what passes through it, and which blocks to leave out.

Paper   Men et al. 2024, arXiv:2403.03853 (ShortGPT), block influence
Cost    one forward pass
Differs nothing; blocks at either end may be kept by rule
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def influence(inputs: Tensor, outputs: Tensor) -> float:
    """Return the summed block influence of tokens: Σ_t 1 - cos(input_t, output_t).

    Divided by the number of tokens it is the paper's BI: 0 for a block that only rescales its input.

    Args:
        inputs: (..., width) what the block got.
        outputs: (..., width) what it gave, residual included.
    """
    before = inputs.reshape(-1, inputs.shape[-1]).float()
    after = outputs.reshape(-1, outputs.shape[-1]).float()
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=1)
    return float((1 - cosine).double().sum())


def removed(influences: Sequence[float], count: int, *, keep_first: int = 0, keep_last: int = 0) -> tuple[int, ...]:
    """Return the blocks to leave out: the `count` of least influence, in order; ties go to the later block.

    Args:
        influences: Block influence of every block.
        count: How many to leave out.
        keep_first: Blocks at the start that stay.
        keep_last: Blocks at the end that stay.

    >>> removed([0.5, 0.1, 0.2, 0.05, 0.6], 2, keep_first=1)
    (1, 3)
    """
    candidates = range(keep_first, len(influences) - keep_last)
    if count > len(candidates):
        raise ValueError(f"{count} of {len(candidates)} blocks can't be left out")
    return tuple(sorted(sorted(candidates, key=lambda i: (influences[i], -i))[:count]))
