"""Round to nearest and GPTQ as methods of the walk: group in, packed `gptq` tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optikit.algorithms import gptq
from optikit.algorithms.correction import corrected
from optikit.algorithms.grid import Grid, Quantized, dequantize, pruned_mask
from optikit.calibration.gram import Gram, PairedGram
from optikit.calibration.method import Applied, Group
from optikit.formats.gptq import pack


def _mask(weights: tuple[Tensor, ...]) -> Tensor | None:
    """Return which of the stacked weights are alive, where any of the linears was pruned."""
    masks = [pruned_mask(weight) for weight in weights]
    if all(mask is None for mask in masks):
        return None
    alive = (torch.ones_like(w, dtype=torch.bool) if m is None else m for m, w in zip(masks, weights, strict=True))
    return torch.cat(list(alive))


def _applied(group: Group, quantized: Quantized, bits: int, facts: Mapping[str, Any]) -> Applied:
    """Cut the stacked rows of a group into its linears again, packed."""
    rows = [len(weight) for weight in group.weights]
    parts = [Quantized(*part) for part in zip(*(torch.split(t, rows) for t in quantized), strict=True)]
    tensors = {
        f"{name}.{suffix}": tensor
        for name, part in zip(group.names, parts, strict=True)
        for suffix, tensor in pack(part.codes, part.scales, part.zeros, bits).items()
    }
    return Applied(
        weights=tuple(dequantize(*part) for part in parts),
        tensors=tensors,
        facts=dict.fromkeys(group.names, facts),
    )


@dataclass(frozen=True)
class Gptq:
    """GPTQ on stacked rows: linears that see the same input share a Hessian."""

    grid: Grid
    damp: float
    act_order: bool

    def statistic(self, width: int, device: str) -> Gram:
        """Return an empty Hessian."""
        return Gram(width, device)

    def apply(self, group: Group, statistic: Gram) -> Applied:
        """Quantize the group."""
        return self.quantize(group, torch.cat(group.weights), statistic.mean())

    def quantize(self, group: Group, target: Tensor, hessian: Tensor) -> Applied:
        """Quantize the stacked rows of a group, aiming at `target` in place of their weights."""
        mask = _mask(group.weights)
        rounded = gptq.quantize(target, hessian, self.grid, damp=self.damp, act_order=self.act_order, mask=mask)
        loss = relative_loss(target, dequantize(*rounded.quantized), hessian)
        facts = {"damp": rounded.damp, "damp_asked": self.damp, "loss": loss}
        return _applied(group, rounded.quantized, self.grid.bits, facts)


@dataclass(frozen=True)
class CorrectedGptq:
    """GPTQ that aims at the dense model's outputs."""

    gptq: Gptq
    damp: float

    def statistic(self, group: Group) -> PairedGram:
        """Return an empty Hessian, and nothing lacking yet."""
        return PairedGram(group)

    def apply(self, group: Group, statistic: PairedGram) -> Applied:
        """Correct the group's weights, then quantize them."""
        weight = torch.cat(group.weights)
        hessian = statistic.mean()
        target = corrected(weight, hessian, statistic.lacking(), damp=self.damp, tokens=statistic.tokens)
        return self.gptq.quantize(group, target, hessian)


def relative_loss(weight: Tensor, new: Tensor, hessian: Tensor) -> float:
    """Return the squared error of a layer's outputs, relative to the outputs' own squared norm."""
    error = weight - new
    lost, norm = ((part @ hessian).mul_(part).sum().item() for part in (error, weight))
    return lost / norm if norm > 0 else 0.0
