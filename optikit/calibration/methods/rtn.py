"""DOCSTRING optikit.calibration.methods.rtn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optikit.algorithms import rtn
from optikit.algorithms.grid import Grid
from optikit.calibration.method import Applied, Group
from optikit.calibration.methods.gptq import _applied, _mask


@dataclass(frozen=True)
class Rtn:
    """Round to nearest."""

    grid: Grid

    def apply(self, group: Group) -> Applied:
        """Round every linear of the group."""
        weight = torch.cat(group.weights)
        mask = _mask(group.weights)
        quantized = rtn.quantize(weight, self.grid, mask)
        return _applied(group, quantized, self.grid.bits, {})
