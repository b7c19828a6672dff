"""Wanda: the weights whose product with the usual size of their input is smallest become zero; the rest stay.

Paper   Sun et al. 2023, arXiv:2306.11695, equation 1
Cost    one sum of squares per input channel and one sort per row; no weight is updated
Differs nothing: scores are compared within each output row, as its section 3 says; n:m compares within groups of m
"""

from __future__ import annotations

from torch import Tensor

from optikit.algorithms.sparsity import Pattern, smallest


def scores(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """Return |W_ij| · ‖X_j‖₂ (equation 1).

    Args:
        weight: (out, in).
        squared_norms: (in,) sum over all calibration tokens of the input's square: the diagonal of Xᵀ X.

    Returns:
        (out, in) float32.
    """
    return weight.float().abs() * squared_norms.float().sqrt()


def mask(weight: Tensor, squared_norms: Tensor, pattern: Pattern) -> Tensor:
    """Return which weights become zero.

    Where calibration never reached a channel its norm is 0 and its weights go first; a layer that was never reached
    at all is compared by magnitude.

    Returns:
        (out, in) bool.
    """
    if not squared_norms.any():
        return smallest(weight.float().abs(), pattern, per_row=True)
    return smallest(scores(weight, squared_norms), pattern, per_row=True)
