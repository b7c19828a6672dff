"""Where zeros may lie, and which weights have the smallest scores: what every pruning method ends with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """How many weights become zero, and where.

    Attributes:
        sparsity: Share of weights that become zero, in [0, 1).
        group: 0 lets zeros lie anywhere; m > 0 puts `zeros` of them into every m consecutive weights of a row.
    """

    sparsity: float = 0.5
    group: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity} is not in [0, 1)")
        if self.group and self.zeros != self.sparsity * self.group:
            raise ValueError(f"sparsity {self.sparsity} of {self.group} weights is no whole number")

    @property
    def zeros(self) -> int:
        """Zeros in every `group` weights."""
        return round(self.sparsity * self.group)


def _smallest_anywhere(scores: Tensor, count: int) -> Tensor:
    flat = scores.reshape(-1)
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    if count:
        threshold = flat.kthvalue(count).values
        mask |= flat < threshold
        ties = (flat == threshold).nonzero().reshape(-1)
        mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def _smallest_per_row(scores: Tensor, count: int) -> Tensor:
    order = scores.argsort(dim=1, stable=True)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, order[:, :count], value=True)


def smallest(scores: Tensor, pattern: Pattern, *, per_row: bool = False) -> Tensor:
    """Return the mask of the weights with the smallest scores, as many and where the pattern says.

    Args:
        scores: (out, in), no NaN; equal scores go by position, the first first.
        pattern: With a group, `in` must be a multiple of it.
        per_row: Compare within each row instead of over the whole matrix. A group pattern always does.

    Returns:
        (out, in) bool, True where the weight becomes zero. Exactly round(sparsity · count) of them.

    >>> smallest(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), Pattern(0.5, group=4)).int().tolist()
    [[0, 1, 1, 0]]
    """
    rows, width = scores.shape
    if pattern.group:
        if width % pattern.group:
            raise ValueError(f"{width} columns are no multiple of the pattern's {pattern.group}")
        return _smallest_per_row(scores.reshape(-1, pattern.group), pattern.zeros).reshape(rows, width)
    if per_row:
        return _smallest_per_row(scores, round(pattern.sparsity * width))
    return _smallest_anywhere(scores, round(pattern.sparsity * scores.numel()))


def holds(weight: Tensor, pattern: Pattern) -> bool:
    """Return whether a weight (out, in) has at least the zeros that the pattern asks for, where it asks for them.

    Rounding of the counts is forgiven: one weight per row.
    """
    rows, width = weight.shape
    if pattern.group:
        zeros = (weight.reshape(-1, pattern.group) == 0).sum(dim=1)
        return bool((zeros >= pattern.zeros).all())
    return int((weight == 0).sum()) >= pattern.sparsity * rows * width - rows
