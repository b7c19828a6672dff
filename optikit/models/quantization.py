"""`quantization_config` of a model directory: which trait it means, and how packed tensors stand for a linear layer.

Layouts, with `in` and `out` the layer's features:

    gptq                 qweight int32 (in · bits / 32, out)     scales (groups, out)
    awq, gemm            qweight int32 (in, out · bits / 32)     scales (groups, out)
    compressed-tensors   weight int8 (out, in)                   weight_scale (out, 1)     format int-quantized
    bitsandbytes, int8   weight int8 (out, in)                   SCB (out)

A linear that was left alone has a plain `weight` in every one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optikit.errors import RecipeError
from optikit.models.facts import TensorFacts, Trait


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the weights of a directory are stored.

    Attributes:
        trait: What that makes of the directory.
        bits: Bits per packed weight.
        packed: Which axis of `qweight` is packed; None where nothing is.
    """

    trait: Trait
    bits: int = 0
    packed: Literal["in", "out"] | None = None

    def shape(self, linear: str, tensors: Mapping[str, TensorFacts], *, transposed: bool) -> tuple[int, int] | None:
        """Return (out_features, in_features) of a linear, or None if it isn't there."""
        packed = tensors.get(f"{linear}.qweight")
        if packed is not None and self.packed is not None and len(packed.shape) == 2:
            rows, columns = packed.shape
            per_word = 32 // self.bits
            return (columns, rows * per_word) if self.packed == "in" else (columns * per_word, rows)
        plain = tensors.get(f"{linear}.weight")
        if plain is None or len(plain.shape) != 2:
            return None
        rows, columns = plain.shape
        return (columns, rows) if transposed else (rows, columns)


DENSE = Scheme(trait="dense")


def scheme(config: Mapping[str, Any], where: Path) -> Scheme:
    """Return how the weights are stored, from config.json.

    Raises:
        RecipeError: In a way that isn't known here.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return DENSE
    found = _known(settings) if isinstance(settings, dict) else None
    if found is None:
        message = f"{where}: {_describe(settings)} can't be read as the start of a stack"
        raise RecipeError(message, fix="start from the model before it was quantized, or from a gptq or awq directory")
    return found


def _known(settings: Mapping[str, Any]) -> Scheme | None:
    method, bits = settings.get("quant_method"), settings.get("bits")
    if method == "gptq" and bits == 4:
        return Scheme(trait="int4_gptq", bits=4, packed="in")
    if method == "gptq" and bits == 8:
        return Scheme(trait="int8_gptq", bits=8, packed="in")
    if method == "awq" and bits == 4 and str(settings.get("version", "gemm")).lower() == "gemm":
        return Scheme(trait="int4_awq", bits=4, packed="out")
    if method == "compressed-tensors" and _is_w8a8(settings):
        return Scheme(trait="int8_w8a8")
    if method == "bitsandbytes" and settings.get("load_in_8bit") is True:
        return Scheme(trait="int8_llm")
    return None


def _is_w8a8(settings: Mapping[str, Any]) -> bool:
    groups = settings.get("config_groups")
    if settings.get("format") != "int-quantized" or not isinstance(groups, dict) or not groups:
        return False
    parts = [group.get(part) for group in groups.values() for part in ("weights", "input_activations")]
    return all(isinstance(part, dict) and part.get("num_bits") == 8 and part.get("type") == "int" for part in parts)


def _describe(settings: Any) -> str:
    if not isinstance(settings, dict):
        return "its quantization_config"
    told = (f"{key} {settings[key]}" for key in ("quant_method", "bits", "version", "format") if key in settings)
    return f"quantization ({', '.join(told)})"
