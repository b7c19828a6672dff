"""Rounding to a grid, for any algorithm and packing: group in, packed tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from optikit.algorithms.grid import Grid, Quantized, Rounded, dequantize, pruned_mask
from optikit.calibration import aims
from optikit.calibration.gram import Gram, gram_of
from optikit.calibration.method import Group, Result, RowMethod
from optikit.calibration.write_checkpoint import GridLayout
from optikit.formats.packing import IntegerPacking


class GramKernel(Protocol):
    """An algorithm that rounds on the inputs behind a Gram matrix."""

    def __call__(self, weight: Tensor, hessian: Tensor, grid: Grid, *, mask: Tensor | None) -> Rounded:
        """Round stacked weights (out, in), given (in, in); `mask` (out, in) holds zeros where it is False."""
        ...


DataFreeKernel = Callable[[Tensor, Grid], Quantized]
"""Rounds weights (out, in)."""


@dataclass(frozen=True)
class DataFreeRounding(RowMethod):
    """Rounds each output by a kernel that looks at nothing else."""

    layout: GridLayout
    kernel: DataFreeKernel

    def rows(self, weight: Tensor, _: str, /) -> dict[str, Tensor]:
        """Round some outputs; zeros stay zero on every grid."""
        return self.layout.packing.pack(*self.kernel(weight, self.layout.grid))


@dataclass(frozen=True)
class GramRounding:
    """Rounds weights by a kernel that takes a Gram matrix; linears that see the same input share it.

    Attributes:
        layout: The packing.
        kernel: The algorithm.
        correct_damp: See `Method`.
    """

    layout: GridLayout
    kernel: GramKernel
    correct_damp: float | None = None

    def statistic(self, group: Group) -> Gram:
        """Return an empty Gram matrix."""
        return gram_of(group, self.correct_damp)

    def apply(self, group: Group, statistic: Gram) -> Result:
        """Round every linear of a group."""
        target, gram, grid = group.target, statistic.mean(), self.layout.grid
        rounded = self.kernel(target, gram, grid, mask=_mask(group.weights))
        loss = relative_loss(target, dequantize(*rounded.quantized), gram)
        return _packed(group, rounded.quantized, self.layout.packing, {**rounded.facts, "loss": loss})


def _mask(weights: tuple[Tensor, ...]) -> Tensor | None:
    """Return which of the stacked weights are alive, where any of the linears was pruned."""
    masks = [pruned_mask(weight) for weight in weights]
    if all(mask is None for mask in masks):
        return None
    alive = (torch.ones_like(w, dtype=torch.bool) if m is None else m for m, w in zip(masks, weights, strict=True))
    return torch.cat(list(alive))


def _packed(group: Group, quantized: Quantized, packing: IntegerPacking, facts: Mapping[str, Any]) -> Result:
    """Cut the stacked rows of a group into its linears again, packed."""
    parts = [Quantized(*part) for part in zip(*(group.split(tensor) for tensor in quantized), strict=True)]
    tensors = {
        f"{name}.{suffix}": tensor
        for name, part in zip(group.names, parts, strict=True)
        for suffix, tensor in packing.pack(*part).items()
    }
    aimed = {} if group.corrected is None else aims.kept(group.names, group.split(group.pruned_target))
    weights, rows = tuple(dequantize(*part) for part in parts), dict.fromkeys(group.names, facts)
    return Result(weights=weights, tensors=tensors, aims=aimed, facts=rows)


def relative_loss(weight: Tensor, new: Tensor, hessian: Tensor) -> float:
    """Return the squared error of a layer's outputs, relative to the outputs' own squared norm."""
    error = weight - new
    lost, norm = ((part @ hessian).mul_(part).sum().item() for part in (error, weight))
    return lost / norm if norm > 0 else 0.0
