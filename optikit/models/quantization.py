"""`quantization_config` of a model directory: which trait it means, and how packed tensors stand for a linear layer.

Layouts, with `in` and `out` the layer's features:

    gptq                 qweight int32 (in · bits / 32, out)     scales (groups, out)
    awq, gemm            qweight int32 (in, out · bits / 32)     scales (groups, out)
    compressed-tensors   weight int8 (out, in)                   weight_scale (out, 1)     format int-quantized
    bitsandbytes, int8   weight int8 (out, in)                   SCB (out)
    bitsandbytes, nf4    weight uint8 (out · in / 2, 1)          weight.quant_state… JSON, with the shape

A linear that was left alone has a plain `weight` in every one of them. Which settings mean which: traits.toml.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optikit.errors import IntegrityError, RecipeError
from optikit.models import traits
from optikit.models.facts import TensorFacts
from optikit.models.headers import read_values
from optikit.models.strict_json import parse_object
from optikit.models.traits import Storage

NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
"""Suffix of the tensor of an nf4 linear that holds JSON."""
FOREIGN = frozenset(
    {"qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "weight_shape", "SCB", "absmax"}
    | {"W_q", "q_weight", "Qidxs", "codes", "gate_up_proj_blocks", "down_proj_blocks"}
)
"""Last parts of names that tensors have in packed checkpoints only, whoever wrote them."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""dtypes in which a weight stands for itself."""
OLD_SETTINGS = "quantize_config.json"
"""Where AutoGPTQ kept what config.json has as quantization_config today."""


def scheme(config: Mapping[str, Any], where: Path) -> Storage:
    """Return how the weights are stored, from config.json.

    Raises:
        RecipeError: In a way that isn't known here.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return traits.rows()[traits.DENSE]
    rows = traits.rows().values() if isinstance(settings, dict) else ()
    found = next((row for row in rows if row.config and row.fits(settings)), None)
    if found is None:
        message = f"{where}: {_describe(settings)} can't be read as the start of a stack"
        raise RecipeError(message, fix="start from the model before it was quantized, or from a gptq or awq directory")
    mixed = next((rule for rule, row in _dynamic(settings) if row.get("bits", found.bits) != found.bits), None)
    if mixed is not None:
        message = f"{where}: linears that match {mixed!r} have another number of bits than the {found.bits} of the rest"
        raise RecipeError(message, fix="quantize the model anew, with one number of bits")
    return found


def require_agreement(
    storage: Storage, linears: Iterable[str], tensors: Mapping[str, TensorFacts], where: Path
) -> None:
    """Refuse packed weights that config.json doesn't tell of, and a quantization that no weight has.

    Loaders read codes as weights, or draw random ones in their place.

    Raises:
        RecipeError: Naming a tensor, or what is promised.
    """
    if storage.config:
        if not any(storage.packs(name, tensors) for name in linears):
            message = f"{where}: config.json promises weights that are {storage.trait}, and not one is packed"
            raise RecipeError(message, fix="take quantization_config out of config.json, if the weights are dense")
        return
    packed = next((name for name in sorted(tensors) if _is_packed(name, tensors[name])), None)
    if packed is not None:
        message = f"{where} holds packed weights ({packed}), and config.json has no quantization_config"
        fix = "get the config.json that belongs to them, or start from the model before it was quantized"
        if (where / OLD_SETTINGS).is_file():
            fix = f"copy the contents of {OLD_SETTINGS} into config.json as quantization_config, with a quant_method"
        raise RecipeError(message, fix=fix)


def _is_packed(name: str, tensor: TensorFacts) -> bool:
    *_, last = name.rpartition(".")
    return last in FOREIGN or (last == "weight" and tensor.dtype not in FLOATS)


def _dynamic(settings: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what GPTQModel calls dynamic: a pattern of names, and what is different about those linears."""
    rules = settings.get("dynamic")
    rows = rules.items() if isinstance(rules, dict) else ()
    yield from ((rule, row) for rule, row in rows if isinstance(row, dict))


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
    keys = ("quant_method", "bits", "version", "format", "checkpoint_format", "load_in_8bit", "bnb_4bit_quant_type")
    told = (f"{key} {settings[key]}" for key in keys if key in settings)
    return f"quantization ({', '.join(told)})"
