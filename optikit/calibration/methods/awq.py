"""AWQ as a method of the walk: scale a group's inputs, fold the inverse into the op before them, quantize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optikit.algorithms import awq, gptq, rtn
from optikit.algorithms.grid import Grid, Quantized, dequantize, fit, pruned_mask
from optikit.calibration import aims
from optikit.calibration.gram import Gram, gram_of
from optikit.calibration.method import Group, PreviousOp, Result
from optikit.calibration.methods.fold import fold
from optikit.calibration.write_checkpoint import ScaledLayout
from optikit.formats.packing import IntegerPacking


@dataclass(frozen=True)
class Awq:
    """Scale salient channels up, then quantize to 4 bits.

    Attributes:
        layout: Of the files.
        packing: Of a linear.
        grid: The grid of the scaled weights.
        steps: Scales tried for each of two families.
        damp: Round by GPTQ with this damping; None rounds to nearest.
        correct_damp: See `Method`.
    """

    layout: ScaledLayout
    packing: IntegerPacking
    grid: Grid
    steps: int
    damp: float | None = None
    correct_damp: float | None = None

    def statistic(self, group: Group) -> Gram:
        """Return an empty Gram matrix."""
        return gram_of(group, self.correct_damp)

    def apply(self, group: Group, statistic: Gram) -> Result:
        """Quantize a group."""
        weight, gram = group.pruned_target, statistic.mean()
        plain = torch.ones(group.width, device=weight.device)
        scale, alpha, folded = self._scaled(group, weight, gram)
        if group.scale is not None:
            scale = group.scale
        elif alpha is not None and self._error(weight, gram, scale) >= self._error(weight, gram, plain):
            scale, alpha, folded = plain, None, {}  # better with min-max ranges, not with searched ones
        scaled = weight * scale
        quantized = self._round(scaled, gram / scale / scale[:, None])
        back = dequantize(*quantized) / scale
        tensors = dict(folded)
        for name, *parts in zip(group.names, *(group.split(part) for part in quantized), strict=True):
            packed = self.packing.pack(*parts)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        facts = {"alpha": alpha, "joint": group.scale is not None, "loss": _relative(back - weight, weight, gram)}
        aimed = {} if group.corrected is None else aims.kept(group.names, group.split(scaled), scale)
        rows = dict.fromkeys(group.names, facts)
        return Result(weights=group.split(back), tensors=tensors, aims=aimed, facts=rows)

    def joint(self, previous: PreviousOp, sample: Tensor, gram: Tensor) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """Return a scale for all experts of a block, of powers of two: what chooses experts then chooses as before."""
        found = self._searched(sample, gram, previous, powers=True)
        if found.alpha is None:
            return None
        folded, exact = fold(previous, found.scale, suffix=self.packing.scales, axis=0)
        return exact, folded

    def _searched(self, weight: Tensor, gram: Tensor, previous: PreviousOp, *, powers: bool = False) -> awq.Scaling:
        minmax = replace(self.grid, search=False)
        return awq.search_scale(
            weight,
            gram,
            lambda scaled: dequantize(*rtn.quantize(scaled, minmax)),
            group_size=self.grid.group_size,
            ties=previous.ties,
            steps=self.steps,
            powers=powers,
        )

    def _scaled(self, group: Group, weight: Tensor, gram: Tensor) -> tuple[Tensor, float | None, dict[str, Tensor]]:
        plain = torch.ones(group.width, device=weight.device)
        if group.previous is None:
            return plain, None, {}
        found = self._searched(weight, gram, group.previous)
        if found.alpha is None:
            return plain, None, {}
        axis, _ = self.packing.outputs[self.packing.scales]
        folded, exact = fold(group.previous, found.scale, suffix=self.packing.scales, axis=axis)
        return exact, found.alpha, folded

    def _error(self, weight: Tensor, gram: Tensor, scale: Tensor) -> float:
        """Return the squared output error of rounding to nearest."""
        rounded = self._nearest(weight * scale, gram.diagonal() / scale.square())
        return float(awq.output_error(dequantize(*rounded) / scale - weight, gram).sum())

    def _nearest(self, scaled: Tensor, diagonal: Tensor) -> Quantized:
        floor = 1e-6 * float(diagonal.mean()) or 1.0  # a channel that is never active costs a little, too
        rounded = rtn.nearest(scaled, self.grid, fit(scaled, self.grid, diagonal.clamp_min(floor)))
        return rtn.masked(rounded, pruned_mask(scaled))

    def _round(self, scaled: Tensor, gram: Tensor) -> Quantized:
        if self.damp is None:
            return self._nearest(scaled, gram.diagonal())
        return gptq.quantize(scaled, gram, self.grid, damp=self.damp, mask=pruned_mask(scaled)).quantized


def _relative(error: Tensor, weight: Tensor, gram: Tensor) -> float:
    """Return the squared error of the outputs, relative to their own squared norm."""
    norm = float(awq.output_error(weight, gram).sum())
    return float(awq.output_error(error, gram).sum()) / norm if norm > 0 else 0.0
