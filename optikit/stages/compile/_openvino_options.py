"""Options of `compile: {engine: openvino}`, and what follows from them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from optikit.models.facts import ModelFacts
from optikit.stage import StageOptions


class Options(StageOptions):
    """Options of `compile: {engine: openvino}`."""

    weight_format: Literal["int8", "int4", "float"] = "int8"
    """Weights of the linears and the embedding; `float` keeps the checkpoint's own."""
    group_size: int | None = Field(default=None, ge=-1, le=1024)
    """Weights that share a scale in int4; has to divide the linears' input widths, -1 is a whole row. None takes the
    largest of 128, 64, 32 that does."""
    sym: bool = False
    """Round to a grid around zero in int4, without zero points."""
    ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the weights that becomes int4; the most sensitive rest becomes int8."""
    awq: bool = False
    """Scale weights by the activations they meet before rounding them to int4."""
    scale_estimation: bool = False
    """Fit the scales of int4 groups to the layer's output on calibration text."""


def calibrated(options: Options) -> bool:
    """Return whether these options look at calibration text."""
    return options.awq or options.scale_estimation


def group(options: Options, facts: ModelFacts) -> int:
    """Return the group size that int4 weights get; a whole row where no usual one divides all widths."""
    if options.group_size is not None:
        return options.group_size
    widths = {columns for _, columns in facts.linears.values()}
    return next((size for size in (128, 64, 32) if all(width % size == 0 for width in widths)), -1)
