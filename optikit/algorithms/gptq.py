"""GPTQ: round weights one column at a time, moving each error onto the columns not yet rounded.

Frantar et al. 2022, arXiv:2210.17323, Algorithm 1. For rows w of a layer with inputs X and H = X Xᵀ, rounding column j
costs (w_j - q_j)² / [H⁻¹]_jj after the remaining columns have moved by -(w_j - q_j) / [H⁻¹]_jj · [H⁻¹]_j,: (eq. 2).
The upper Cholesky factor U of H⁻¹ holds those rows of all successive inverses: the step is U_jk / U_jj.

Differs from the paper: columns go in order of activation, while groups stay where they are in the row (so the result
needs no index); scales are searched with the cost 1 / [H⁻¹]_jj per column; columns that were never active are rounded
instead of zeroed; where H can't be factored after more damping, the layer is rounded and the caller is told.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optikit.algorithms import rtn
from optikit.algorithms.grid import Grid, Quantized, Rounded, Scales, fit
from optikit.algorithms.hessian import inverse_factor

OUTER, INNER = 128, 16
"""Columns after which an error reaches the rest of the row, and the rest of its block: fewer passes over memory."""


def quantize(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    mask: Tensor | None = None,
) -> Rounded:
    """Quantize a layer so that its outputs change least on the inputs behind `hessian`.

    Layers that share their input may be stacked along the rows: every row is on its own.

    Args:
        weight: (out, in) float32.
        hessian: (in, in) float32, symmetric, sum (or mean) of x xᵀ.
        grid: Bits, group size, symmetry, search.
        damp: Added to the Hessian's diagonal, as a fraction of its mean.
        act_order: Round columns with large activations first, while many others can still take their error.
        mask: (out, in) bool: False holds a weight at exactly zero; None prunes nothing.

    Returns:
        Facts are the damping used, `damp`, 0.0 where the layer was rounded to nearest instead, and `damp_asked`.

    Raises:
        ValueError: The group size doesn't divide the columns.
    """
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    found = inverse_factor(hessian, damp, order)
    if found is None:
        return Rounded(rtn.quantize(weight, grid, mask), {"damp": 0.0, "damp_asked": damp})
    upper, used = found
    importance = torch.empty(len(hessian), device=hessian.device)
    importance[order] = upper.square().sum(0).reciprocal()  # 1 / [H⁻¹]_jj: what is lost per squared error
    chosen = fit(weight, grid, importance)
    codes = _round_columns(weight, upper, order, chosen, grid, mask)
    quantized = Quantized(codes, chosen.scales.half(), chosen.zeros.byte())
    return Rounded(quantized, {"damp": used, "damp_asked": damp})


def _round_columns(
    weight: Tensor, upper: Tensor, order: Tensor, chosen: Scales, grid: Grid, mask: Tensor | None
) -> Tensor:
    """Return codes (out, in) uint8; overwrites `upper`. Columns are rows here: every step is on contiguous memory."""
    columns, rows = len(order), len(weight)
    left = weight.T[order].contiguous()  # (in, out): what the columns not yet rounded should be
    steps = upper.div_(upper.diagonal().clone()[:, None])  # row j: U_jk / U_jj, (in, in)
    group = (order // grid.width(columns)).tolist()
    scales, zeros = chosen.scales.T.contiguous(), chosen.zeros.T.contiguous()
    low, high = -zeros, grid.qmax - zeros
    keep = None if mask is None else mask.T[order].to(left.dtype)
    codes = torch.empty_like(left)  # (in, out)
    errors = torch.empty((OUTER, rows), device=left.device, dtype=left.dtype)
    for start in range(0, columns, OUTER):
        stop = min(start + OUTER, columns)
        for first in range(start, stop, INNER):
            last = min(first + INNER, stop)
            for j in range(first, last):
                g, code, error = group[j], codes[j], errors[j - start]
                torch.div(left[j], scales[g], out=code).round_()
                torch.clamp(code, low[g], high[g], out=code)
                if keep is not None:
                    code.mul_(keep[j])
                torch.addcmul(left[j], code, scales[g], value=-1, out=error)  # w_j - q_j, (out,)
                if j + 1 < last:
                    left[j + 1 : last].addr_(steps[j, j + 1 : last], error, alpha=-1)  # eq. 2
            if last < stop:  # eq. 4: the same for a batch of columns at once
                left[last:stop].addmm_(steps[first:last, last:stop].T, errors[first - start : last - start], alpha=-1)
        if stop < columns:
            left[stop:].addmm_(steps[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    for g in range(len(zeros)):
        codes[[j for j in range(columns) if group[j] == g]] += zeros[g]
    back = torch.empty_like(order)
    back[order] = torch.arange(columns, device=order.device)
    return codes.byte()[back].T.contiguous()
