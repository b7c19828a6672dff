"""`quantization_config` of a model directory: which trait it means, and how packed tensors stand for a linear layer.

Layouts, with `in` and `out` the layer's features:

    gptq                 qweight int32 (in · bits / 32, out)     scales (groups, out)
    awq, gemm            qweight int32 (in, out · bits / 32)     scales (groups, out)
    compressed-tensors   weight int8 (out, in)                   weight_scale (out, 1)     format int-quantized
    bitsandbytes, int8   weight int8 (out, in)                   SCB (out)
    bitsandbytes, nf4    weight uint8 (out · in / 2, 1)          weight.quant_state… JSON, with the shape

A linear that was left alone has a plain `weight` in every one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optikit.errors import IntegrityError, RecipeError
from optikit.models.facts import TensorFacts, Trait
from optikit.models.headers import read_values
from optikit.models.strict_json import parse_object

NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
"""Suffix of the tensor of an nf4 linear that holds JSON."""


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
    return _bitsandbytes(settings) if method == "bitsandbytes" else None


def _is_w8a8(settings: Mapping[str, Any]) -> bool:
    groups = settings.get("config_groups")
    if settings.get("format") != "int-quantized" or not isinstance(groups, dict) or not groups:
        return False
    parts = [group.get(part) for group in groups.values() for part in ("weights", "input_activations")]
    return all(isinstance(part, dict) and part.get("num_bits") == 8 and part.get("type") == "int" for part in parts)


def _bitsandbytes(settings: Mapping[str, Any]) -> Scheme | None:
    if settings.get("load_in_8bit") is True:
        return Scheme(trait="int8_llm")
    kind, storage = settings.get("bnb_4bit_quant_type"), settings.get("bnb_4bit_quant_storage", "uint8")
    is_nf4 = settings.get("load_in_4bit") is True and (kind, storage) == ("nf4", "uint8")
    return Scheme(trait="nf4") if is_nf4 else None


def stated_shapes(directory: Path, tensors: Mapping[str, TensorFacts]) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of the linears whose packing states it beside the weight: those of nf4.

    Args:
        directory: A model directory.
        tensors: Its headers.

    Raises:
        IntegrityError: A statement can't be read, or isn't that of its weight.
    """
    names = {name.removesuffix(NF4_STATE) for name in tensors if name.endswith(f".{NF4_STATE}")}
    stated = read_values(directory, {name + NF4_STATE for name in names})
    return {name.removesuffix("."): _shape(name, stated[name + NF4_STATE], tensors, directory) for name in names}


def _shape(name: str, stated: bytes, tensors: Mapping[str, TensorFacts], directory: Path) -> tuple[int, int]:
    weight = tensors.get(f"{name}weight")
    try:
        shape = parse_object(stated)["shape"]
        rows, columns = (size for size in shape if type(size) is int and size > 0)
    except (ValueError, KeyError, TypeError) as error:
        message = f"{directory}: {name}{NF4_STATE} tells no shape"
        raise IntegrityError(message, fix="quantize it again") from error
    if weight is None or weight.bytes != -(-rows * columns // 2):
        held = "is missing" if weight is None else f"has {weight.bytes} bytes"
        message = f"{directory}: {name}weight {held}, and 4-bit weights of {rows}x{columns} are stated"
        raise IntegrityError(message, fix="quantize it again")
    return rows, columns


def _describe(settings: Any) -> str:
    if not isinstance(settings, dict):
        return "its quantization_config"
    keys = ("quant_method", "bits", "version", "format", "bnb_4bit_quant_type")
    told = (f"{key} {settings[key]}" for key in keys if key in settings)
    return f"quantization ({', '.join(told)})"
