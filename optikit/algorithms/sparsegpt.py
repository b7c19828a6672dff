"""SparseGPT: remove weights one column at a time, moving each error onto columns not yet visited.

Paper   Frantar and Alistarh 2023, arXiv:2301.00774, Algorithm 1
Cost    O(in³ + out·in²) time, two (in, in) float32 matrices
Differs columns that calibration never reached keep their place in the Hessian by damping alone, instead of being set to
        zero outright; the share of a block is met exactly, ties going by position
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optikit.algorithms import magnitude
from optikit.algorithms.hessian import inverse_factor
from optikit.algorithms.sparsity import Pattern, smallest

BLOCK = 128
"""Columns whose mask is chosen together, and whose updates are applied before the rest of the row sees them."""


def prune_group(
    weights: Sequence[Tensor], hessian: Tensor, pattern: Pattern, *, damp: float
) -> tuple[list[Tensor], Mapping[str, Any]]:
    """Prune layers that share their input, each on its own.

    Args:
        weights: (out, in) float32 each; not changed.
        hessian: (in, in) float32, symmetric, mean of x xᵀ.
        pattern: How many, and where.
        damp: Added to the Hessian's diagonal, as a fraction of its mean.

    Returns:
        The pruned weights; and the fact `by_magnitude`, whether the Hessian was empty or couldn't be factored.
    """
    found = inverse_factor(hessian, damp) if hessian.diagonal().any() else None
    if found is None:
        pruned = [weight.masked_fill(magnitude.mask(weight, pattern), 0) for weight in weights]
    else:
        pruned = [prune(weight, found[0], pattern)[0] for weight in weights]
    return pruned, {"by_magnitude": found is None}


def prune(weight: Tensor, factor: Tensor, pattern: Pattern, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Remove weights and let the remaining ones make up for them.

    Args:
        weight: (out, in) float; not changed.
        factor: (in, in) float32, upper Cholesky factor of the damped Hessian's inverse: `hessian.inverse_factor`.
        pattern: How many, and where.
        block: Columns whose mask is chosen together.

    Returns:
        The pruned weight (out, in) float32 and its mask (out, in) bool, True where it is zero.
    """
    pruned = weight.float().clone()
    removed = torch.zeros(pruned.shape, dtype=torch.bool, device=pruned.device)
    step = block - block % pattern.group if pattern.group else block
    for start in range(0, pruned.shape[1], step):
        columns = slice(start, start + step)
        errors, removed[:, columns] = _prune_block(pruned[:, columns], factor[columns, columns], pattern)
        pruned[:, start + step :] -= errors @ factor[columns, start + step :]
    pruned[removed] = 0
    return pruned, removed


def _prune_block(weight: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune a block of columns (out, block) in place; return its errors, scaled, and its mask."""
    diagonal = factor.diagonal()
    errors = torch.zeros_like(weight)
    if pattern.group:
        removed = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    else:
        removed = smallest((weight / diagonal).square(), pattern)  # weights as they enter the block
    for i in range(weight.shape[1]):
        if pattern.group and i % pattern.group == 0:
            ahead = slice(i, i + pattern.group)
            removed[:, ahead] = smallest((weight[:, ahead] / diagonal[ahead]).square(), pattern)
        errors[:, i] = torch.where(removed[:, i], weight[:, i], 0) / diagonal[i]
        weight[:, i:] -= errors[:, i, None] * factor[i, i:]  # column i itself becomes zero
    return errors, removed
