"""NF4 as a method of the walk, in the packing of bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optikit.algorithms import nf4
from optikit.calibration.method import RowMethod
from optikit.calibration.write_checkpoint import RoundedLayout
from optikit.formats import nf4 as nf4_format


@dataclass(frozen=True)
class Nf4(RowMethod):
    """Round weights to NF4, for bitsandbytes to serve.

    Attributes:
        layout: The packing.
        dtype: What a server computes in, as torch names it.
    """

    layout: RoundedLayout
    dtype: str

    def rows(self, weight: Tensor, _: str, /) -> dict[str, Tensor]:
        """Round some outputs: whole blocks of weights, or the last ones of a linear."""
        codes, absmax = nf4.quantize(weight)
        return nf4_format.pack(codes, absmax, (weight.shape[0], weight.shape[1]), self.dtype)
