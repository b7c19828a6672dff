"""NF4 as a method of the walk: every linear rounded on its own, in the packing of bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optikit.algorithms import nf4
from optikit.calibration.method import Group, Result
from optikit.calibration.write_checkpoint import ScaledLayout
from optikit.formats import nf4 as nf4_format


@dataclass(frozen=True)
class Nf4:
    """Round weights to NF4, for bitsandbytes to serve.

    Attributes:
        layout: The packing.
        double_quant: Quantize the constants of blocks, too.
        dtype: What a server computes in, as torch names it.
    """

    layout: ScaledLayout
    double_quant: bool
    dtype: str

    def apply(self, group: Group) -> Result:
        """Round every linear of a group."""
        weights: list[Tensor] = []
        tensors: dict[str, Tensor] = {}
        for name, weight in zip(group.names, group.weights, strict=True):
            codes, absmax = nf4.quantize(weight)
            constants = nf4.quantize_constants(absmax) if self.double_quant else absmax
            packed = nf4_format.pack(codes, constants, (weight.shape[0], weight.shape[1]), self.dtype)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
            read = nf4.dequantize_constants(constants) if isinstance(constants, nf4.Constants) else absmax
            weights.append(nf4.dequantize(codes, read).view_as(weight))
        return Result(weights=tuple(weights), tensors=tensors)
