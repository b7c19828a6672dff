"""Options of `compile: {engine: tensorrt}`."""

from __future__ import annotations

from typing import Literal

from optikit.stage import StageOptions


class Options(StageOptions):
    """Options of `compile: {engine: tensorrt}`."""

    precision: Literal["fp16", "bf16"] = "fp16"
    """Dtype of weights and arithmetic; 4-bit graphs of this builder have operators that TensorRT doesn't know."""
