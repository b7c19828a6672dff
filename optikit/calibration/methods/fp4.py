"""FP4 as a method of the walk: each output by itself, and NVFP4's global scale the same for linears that are fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optikit.algorithms import fp4
from optikit.calibration.method import RowMethod
from optikit.calibration.source_model import SourceModel
from optikit.calibration.write_checkpoint import RoundedLayout
from optikit.formats.fp4 import pack


@dataclass(frozen=True)
class Nvfp4Rows(RowMethod):
    """Round each output to NVFP4.

    Attributes:
        layout: The packing.
        common: Global scale (1,) of every linear, by full name.
        search: Choose scales by squared error.
    """

    layout: RoundedLayout
    common: Mapping[str, Tensor]
    search: bool

    def rows(self, weight: Tensor, name: str, /) -> dict[str, Tensor]:
        """Round some outputs."""
        common = self.common[name].to(weight.device)
        codes, scales = fp4.nvfp4(weight, common, search=self.search)
        return {"weight_packed": pack(codes), "weight_scale": scales, "weight_global_scale": common.clone()}


@dataclass(frozen=True)
class Mxfp4Rows(RowMethod):
    """Round each output to MXFP4."""

    layout: RoundedLayout
    search: bool

    def rows(self, weight: Tensor, _: str, /) -> dict[str, Tensor]:
        """Round some outputs."""
        codes, exponents = fp4.mxfp4(weight, search=self.search)
        return {"weight_packed": pack(codes), "weight_scale": exponents}


def global_scales(source: SourceModel, ignore: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return the global scale of every linear, one for all that see the same input: servers multiply them as one.

    Reads all weights once, a strip of a linear at a time.
    """
    found: dict[str, Tensor] = {}
    for block in range(source.layers):
        for group in source.groups(block, ignore):
            largest = [weight.abs().amax() for linear in group for _, weight in source.strips(linear)]
            found |= dict.fromkeys((linear.name for linear in group), fp4.global_scale(torch.stack(largest).amax()))
    return found
