"""Magnitude pruning: the smallest weights of a layer become zero, whatever flows through them.

Paper   Han et al. 2015, arXiv:1506.02626, without its retraining
Cost    one sort of the layer
Differs the trivial baseline that every other pruning here is judged against; `per_row` is how Wanda compares
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from optikit.algorithms.sparsity import Pattern, smallest, threshold


def masks(weight: Callable[[], Iterable[Tensor]], pattern: Pattern) -> Iterator[Tensor]:
    """Yield the same for each strip of a weight that is never whole in memory; without a group it is read three times.

    Args:
        weight: Reads it, some rows (n, in) float32 at a time.
        pattern: How many, and where.

    Yields:
        (n, in) bool; joined, what `mask` returns for the whole.
    """
    if pattern.group:
        yield from (mask(rows, pattern) for rows in weight())
        return
    largest, ties = threshold(lambda: (rows.abs() for rows in weight()), pattern.sparsity)
    for rows in weight():
        size = rows.abs()
        equal = (size == largest).reshape(-1).nonzero().reshape(-1)[:ties]
        found = size < largest
        found.view(-1)[equal] = True
        ties -= len(equal)
        yield found


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
