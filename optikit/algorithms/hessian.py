"""The inverse of a layer's Hessian, factored: what GPTQ and SparseGPT move errors by.

H = V Vᵀ with V upper triangular (a Cholesky factorization from the last row up) gives H⁻¹ = V⁻ᵀ V⁻¹, so that U = V⁻¹ is
the upper Cholesky factor of H⁻¹: one factorization, and no inverse to factor again. Row j of U, divided by U_jj, is row
j of the inverse of H without the columns before j, scaled (Frantar et al. 2022, arXiv:2210.17323, section 3.3).

Matrices are (in, in) and may be the largest there are: no more than two are alive at once beside the Hessian.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPINGS = (1.0, 10.0, 100.0)
"""Multiples of the damping that are tried before giving up on a Hessian."""


def inverse_factor(hessian: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor, float] | None:
    """Factor the inverse of a damped Hessian, with more damping where it needs it.

    Args:
        hessian: (in, in) float32, symmetric, positive semidefinite; not changed.
        damp: Added to the diagonal, as a fraction of its mean.
        order: (in,) columns in the order in which they will be visited; None is from the first to the last.

    Returns:
        U (in, in) upper triangular with Uᵀ U = H⁻¹ in that order, and the damping used; None where even the largest
        damping leaves the Hessian indefinite.
    """
    # A column that is never active keeps the damping alone: on its own, and of little weight in the choice of scales.
    mean = hessian.diagonal().mean().item() or 1.0
    last_first = torch.arange(len(hessian), device=hessian.device).flip(0) if order is None else order.flip(0)
    for multiple in DAMPINGS:
        lower = _factored(hessian[last_first[:, None], last_first], damp * multiple * mean)
        if lower is not None:
            inverse = torch.eye(
                len(lower), device=lower.device
            )  # by rows in memory, as those who visit columns want it
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            return inverse.flip(0, 1), damp * multiple
    return None


def cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor of a symmetric matrix in that matrix's own memory; None where there is none."""
    columns_first = matrix.mT  # the same values, and LAPACK's layout: it needs no copy
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(columns_first, out=(columns_first, failed))
    # What isn't finite reaches the diagonal, which is asked because it is small.
    return None if failed.item() or not torch.isfinite(columns_first.diagonal()).all() else columns_first


def _factored(matrix: Tensor, damping: float) -> Tensor | None:
    matrix.diagonal().add_(damping)
    return cholesky(matrix)
