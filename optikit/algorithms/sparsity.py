"""Where zeros may lie, and which weights have the smallest scores: what every pruning method ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def threshold(scores: Callable[[], Iterable[Tensor]], sparsity: float) -> tuple[float, int]:
    """Return the largest of the scores that are the smallest, exactly, without having them in memory together.

    Bits of floats that aren't negative are ordered as the floats are: two histograms find it, of the upper and of the
    lower sixteen bits.

    Args:
        scores: Reads them, float32, none negative, some at a time; asked twice.
        sparsity: Share of them that is wanted.

    Returns:
        The score, and how many that are equal to it belong to the smallest.
    """
    upper = sum(torch.bincount(_bits(part) >> 16, minlength=1 << 15) for part in scores())
    assert isinstance(upper, Tensor)  # noqa: S101 - of at least one strip
    count = round(sparsity * int(upper.sum()))
    if not count:
        return 0.0, 0
    high, count = _place(upper, count)
    lower = sum(torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16) for bits in map(_bits, scores()))
    assert isinstance(lower, Tensor)  # noqa: S101 - as above
    low, count = _place(lower, count)
    return float(torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32)), count


def _bits(scores: Tensor) -> Tensor:
    return scores.reshape(-1).view(torch.int32)


def _place(counts: Tensor, number: int) -> tuple[int, int]:
    """Return the bin of a histogram that has element `number`, counted from 1, and which of the bin's it is."""
    upto = counts.cumsum(0)
    place = int((upto < number).sum())
    return place, number - int(upto[place] - counts[place])


def holds(weight: Tensor, pattern: Pattern) -> bool:
    """Return whether a weight (out, in) has at least the zeros that the pattern asks for, where it asks for them.

    Rounding of the counts is forgiven: one weight per row.
    """
    rows, width = weight.shape
    if pattern.group:
        zeros = (weight.reshape(-1, pattern.group) == 0).sum(dim=1)
        return bool((zeros >= pattern.zeros).all())
    return int((weight == 0).sum()) >= pattern.sparsity * rows * width - rows
