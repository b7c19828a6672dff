"""Width pruning: which MLP channels and attention heads matter least, and how the others make up for them.

Paper   Ma et al. 2023, arXiv:2305.11627 (LLM-Pruner): coupled groups, element-wise importance to first order, summed
        over a group; the compensation is the optimal brain surgeon's, as in Kurtic et al. 2023, arXiv:2302.04089
Cost    sums over the weights; compensation O(in³ + out·in²)
Differs without gradients a group is judged by how large its contribution to the outputs is
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The share of one weight matrix in coupled groups: group u owns `size` consecutive rows (or columns).

    Attributes:
        weight: (out, in).
        gradient: (out, in), of the loss with respect to the weight, summed over the calibration tokens.
        columns: Groups own columns instead of rows.
        size: Rows (or columns) per group.
    """

    weight: Tensor
    gradient: Tensor
    columns: bool = False
    size: int = 1


def taylor(parts: Sequence[Part]) -> Tensor:
    """Return how much the loss would change, to first order, if a group were removed: Σ |w · ∂L/∂w| over its weights.

    Args:
        parts: Every weight matrix that removing a group touches, with the same number of groups each.

    Returns:
        (groups,) float32.
    """
    total: Tensor | None = None
    for part in parts:
        salience = (part.weight.float() * part.gradient.float()).abs().sum(dim=0 if part.columns else 1)
        grouped = salience.reshape(-1, part.size).sum(dim=1)
        total = grouped if total is None else total + grouped
    if total is None:
        raise ValueError("a coupled group has no weights")
    return total


def contribution(weight: Tensor, gram: Tensor, size: int = 1) -> Tensor:
    """Return how large the output of each group of input channels is: ‖W_g X_g‖, (in / size,) float32.

    Args:
        weight: (out, in) of the linear that reads the channels.
        gram: (in, in) Xᵀ X over all calibration tokens.
        size: Consecutive channels per group.
    """
    groups = weight.shape[1] // size
    blocks = torch.stack([gram[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])
    columns = weight.float().reshape(-1, groups, size).transpose(0, 1)
    return ((columns @ blocks.float()) * columns).sum(dim=(1, 2)).clamp_min(0).sqrt()


def kept(importance: Tensor, count: int) -> Tensor:
    """Return the `count` most important groups in ascending order, (count,) int64; ties go to the earlier group.

    >>> kept(torch.tensor([1.0, 5.0, 3.0, 3.0]), 2).tolist()
    [1, 2]
    """
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def channels(groups: Tensor, size: int) -> Tensor:
    """Return the rows (or columns) that groups own: (n,) → (n · size,) int64.

    >>> channels(torch.tensor([0, 2]), 2).tolist()
    [0, 1, 4, 5]
    """
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).reshape(-1)


def compensate(weight: Tensor, gram: Tensor, keep: Tensor, *, damp: float = 0.01) -> Tensor:
    """Remove input channels of a linear and let the remaining ones make up for them in the least-squares sense.

    Args:
        weight: (out, in).
        gram: (in, in) Xᵀ X over all calibration tokens.
        keep: (n,) int64, channels that stay.
        damp: Added to the Gram matrix's diagonal, as a fraction of its mean.

    Returns:
        (out, n) float32: the weight that errs least at the outputs, given only those channels. Where the Gram matrix
        can't be inverted, the plain columns.
    """
    damped = gram.double().clone()
    damped.diagonal().add_(damp * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped[keep][:, keep])
    plain = weight[:, keep].float()
    if failed:
        return plain
    lost = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    lost[keep] = False
    carried = torch.cholesky_solve(damped[keep][:, lost], lower)  # each lost channel, predicted from those kept
    return plain + weight[:, lost].float() @ carried.T.float()
