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

from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optikit.errors import IntegrityError, RecipeError
from optikit.models import traits
from optikit.models.facts import TensorFacts
from optikit.models.headers import read_values
from optikit.models.strict_json import parse_object, read_object
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
_STATE = "weight.quant_state.bitsandbytes__"


def scheme(config: Mapping[str, Any], where: Path, names: Container[str] = ()) -> Storage:
    """Return how the weights are stored, from config.json and, where that says nothing, older files beside it.

    Args:
        config: config.json.
        where: Its path.
        names: Names of all tensors, where they tell what settings leave open.

    Raises:
        RecipeError: In a way that isn't known here, or in several.
    """
    settings, beside = _settings(config, where)
    if settings is None:
        return traits.rows()[traits.DENSE]
    found = _row(settings, read_only=beside)
    if found is None:
        message = f"{where}: {_describe(settings)} can't be read as the start of a stack"
        raise RecipeError(message, fix="start from the model before it was quantized, or from a gptq or awq directory")
    _require_blocks(settings.get("weight_block_size"), where)
    found = _settled(found, settings, names)
    mixed = next(_mixed(settings, found.bits), None)
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
            message = (
                f"{where}: config.json promises weights that are {storage.trait or storage.told}, and not one is packed"
            )
            raise RecipeError(message, fix="take quantization_config out of config.json, if the weights are dense")
        return
    packed = next((name for name in sorted(tensors) if _is_packed(name, tensors[name])), None)
    if packed is not None:
        message = f"{where} holds packed weights ({packed}), and config.json has no quantization_config"
        fix = "get the config.json that belongs to them, or start from the model before it was quantized"
        raise RecipeError(message, fix=fix)


def _is_packed(name: str, tensor: TensorFacts) -> bool:
    *_, last = name.rpartition(".")
    return last in FOREIGN or (last == "weight" and tensor.dtype not in FLOATS)


def _row(settings: Any, *, read_only: bool) -> Storage | None:
    """Return the first row that settings tell of; with `read_only` none of those that stages work with."""
    if not isinstance(settings, dict) or any(settings.get(key) for key in _UNREAD):
        return None
    known = () if read_only else traits.rows().values()
    return next((row for row in (*known, *traits.packings().values()) if row.config and row.fits(settings)), None)


def _require_blocks(sides: Any, where: Path) -> None:
    whole = isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
    if sides is not None and not whole:
        message = f"{where}: weight_block_size is {sides!r}; two whole numbers from 1 up are wanted"
        raise RecipeError(message, fix="get config.json again")


_UNREAD = ("transform_config", "sparsity_config", "pre_quant_scale", "quantized_layers")
"""Settings that mean more than packed weights: rotations while serving, sparse packing, scales of inputs, a mixture."""
_SIDECARS: Mapping[str, str] = {
    "quant_config.json": "awq",
    "quantize_config.json": "gptq",
    "hf_quant_config.json": "modelopt",
}
"""Where tools kept their settings before config.json had a place for them, and whose they are."""
_OLD_KEYS = {"w_bit": "bits", "q_group_size": "group_size", "exclude_modules": "ignore", "format": "checkpoint_format"}


def _settings(config: Mapping[str, Any], where: Path) -> tuple[Any, bool]:
    """Return the settings of a directory, None where there are none, and whether they lie beside config.json."""
    settings = config.get("quantization_config")
    if settings is None:
        found = next((name for name in _SIDECARS if (where.parent / name).is_file()), "")
        if not found:
            return None, False
        told = read_object(where.parent / found)
        told = told["quantization"] if isinstance(told.get("quantization"), dict) else told
        renamed = {_OLD_KEYS.get(key, key): value for key, value in told.items()}
        return {"quant_method": _SIDECARS[found], **renamed}, True
    if isinstance(settings, dict) and settings.get("quant_method") in ("gptq", "modelopt"):
        return {**{_OLD_KEYS.get(key, key): value for key, value in settings.items()}, **settings}, False
    return settings, False


def _settled(found: Storage, settings: Mapping[str, Any], names: Container[str]) -> Storage:
    """Return a row with these settings; the other one that they may mean, where the tensors say so."""
    if found.other:
        other = traits.packings()[found.other]
        ends = f".{other.suffixes[0]}"
        if isinstance(names, Iterable) and any(name.endswith(ends) for name in names):
            found = other
    return found.settled(settings)


def _mixed(settings: Mapping[str, Any], bits: int) -> Iterator[str]:
    """Yield which linears have another number of bits than the rest."""
    yield from (rule for rule, row in _dynamic(settings) if row.get("bits", bits) != bits)
    for name, group in (settings.get("config_groups") or {}).items():
        if group.get("weights", {}).get("num_bits", bits) != bits:
            yield ", ".join(map(str, group.get("targets") or [name]))


def _dynamic(settings: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what GPTQModel calls dynamic: a pattern of names, and what is different about those linears."""
    rules = settings.get("dynamic")
    rows = rules.items() if isinstance(rules, dict) else ()
    yield from ((rule, row) for rule, row in rows if isinstance(row, dict))


def stated_shapes(directory: Path, tensors: Mapping[str, TensorFacts]) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of the linears whose packing states it beside them: bitsandbytes' 4 bits.

    Args:
        directory: A model directory.
        tensors: Its headers.

    Raises:
        IntegrityError: A statement can't be read, or isn't that of its weight.
    """
    names = [name for name in tensors if f".{_STATE}" in name]
    stated = read_values(directory, names)
    return {name.partition(f".{_STATE}")[0]: _shape(name, stated[name], tensors, directory) for name in names}


def _shape(name: str, stated: bytes, tensors: Mapping[str, TensorFacts], directory: Path) -> tuple[int, int]:
    linear = name.partition(_STATE)[0]
    weight = tensors.get(f"{linear}weight")
    try:
        shape = parse_object(stated)["shape"]
        rows, columns = (size for size in shape if type(size) is int and size > 0)
    except (ValueError, KeyError, TypeError) as error:
        message = f"{directory}: {name} tells no shape"
        raise IntegrityError(message, fix="quantize it again") from error
    if weight is None or weight.bytes != -(-rows * columns // 2):
        held = "is missing" if weight is None else f"has {weight.bytes} bytes"
        message = f"{directory}: {linear}weight {held}, and 4-bit weights of {rows}x{columns} are stated"
        raise IntegrityError(message, fix="quantize it again")
    return rows, columns


def _describe(settings: Any) -> str:
    if not isinstance(settings, dict):
        return "its quantization_config"
    keys = ["quant_method", "quant_algo", "bits", "version", "format", "checkpoint_format", "load_in_8bit"]
    keys += ["bnb_4bit_quant_type", "bnb_4bit_quant_storage", *(key for key in _UNREAD if settings.get(key))]
    told = (f"{key} {settings[key]}" for key in keys if key in settings)
    return f"quantization ({', '.join(told)})"
