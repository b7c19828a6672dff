"""Magnitude pruning: the smallest weights of a layer become zero, whatever flows through them.

Paper   Han et al. 2015, arXiv:1506.02626, without its retraining
Cost    one sort of the layer
Differs the trivial baseline that every other pruning here is judged against; `per_row` is how Wanda compares
"""

from __future__ import annotations

from torch import Tensor

from optikit.algorithms.sparsity import Pattern, smallest


def mask(weight: Tensor, pattern: Pattern, *, per_row: bool = False) -> Tensor:
    """Return which weights become zero.

    Args:
        weight: (out, in).
        pattern: How many, and where.
        per_row: Remove the same share from every row, instead of the smallest of the whole layer.

    Returns:
        (out, in) bool.
    """
    return smallest(weight.abs(), pattern, per_row=per_row)
