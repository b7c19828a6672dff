"""Checkpoint formats: how weights lie in a directory, whoever wrote them.

`load_state(directory, dtype)` is for runtimes: the dense state dict of any directory that a stage here can write.
`dequantized_state(directory)` is the same, one tensor at a time.
`rounds_activations(directory)` says whether a server of it rounds the inputs of quantized linears, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optikit.errors import IntegrityError
from optikit.formats import awq, compressed_tensors, gptq, llm_int8, nf4
from optikit.formats.checkpoint import Checkpoint, finite
from optikit.models import architectures, language_part, quantization
from optikit.models.architectures import Architecture
from optikit.models.reader import read, tensor_shapes
from optikit.models.traits import Storage


def _gptq(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    return gptq.dequantize(*gptq.unpack(tensors, bits), tensors["g_idx"])


def _awq(tensors: Mapping[str, Tensor], _: int) -> Tensor:
    return gptq.dequantize(*awq.unpack(tensors))


def _llm_int8(tensors: Mapping[str, Tensor], _: int) -> Tensor:
    return llm_int8.dequantize(tensors)


def _nf4(tensors: Mapping[str, Tensor], _: int) -> Tensor:
    return nf4.dequantize(tensors)


def _int_quantized(tensors: Mapping[str, Tensor], _: int) -> Tensor:
    return compressed_tensors.dequantize(tensors)


UNPACK: Mapping[str, Callable[[Mapping[str, Tensor], int], Tensor]] = {
    "int4_gptq": _gptq,
    "int8_gptq": _gptq,
    "int4_awq": _awq,
    "int8_w8a8": _int_quantized,
    "int8_llm": _llm_int8,
    "nf4": _nf4,
}
"""Tensors by suffix, and bits → weight (out, in) float32, by how they are stored."""


def dequantized_state(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a model directory, packed linears as the float weight that they stand for.

    Dense tensors come in the dtype they are stored in, dequantized ones in float32, under the names of the model.

    Raises:
        IntegrityError: A tensor holds NaN or infinity, or would be dropped by a loader and isn't zero.
        RecipeError: The directory is packed in a format that no stage here writes.
    """
    checkpoint = Checkpoint(directory)
    config: Mapping[str, Any] = checkpoint.config()
    storage = quantization.scheme(config, directory / "config.json")
    row, full, alone = _names(config, checkpoint)
    spare = _require_zero(checkpoint, storage, alone, directory)
    for name in checkpoint:
        if name in spare:
            continue
        layer, kind = storage.split(name)
        if not storage.packs(layer, checkpoint):
            yield full[name], finite(name, checkpoint.read(name), directory)
        elif kind == storage.suffixes[0]:
            there = (*storage.suffixes, *(s for s in storage.optional if f"{layer}.{s}" in checkpoint))
            tensors = {suffix: checkpoint.read(f"{layer}.{suffix}") for suffix in there}
            weight = finite(layer, UNPACK[storage.trait](tensors, storage.bits), directory)
            whole = full[name].removesuffix(f".{kind}")
            yield f"{whole}.weight", weight.T.contiguous() if row is not None and row.transposed else weight


def _names(
    config: Mapping[str, Any], checkpoint: Checkpoint
) -> tuple[Architecture | None, dict[str, str], dict[str, str]]:
    """Return the row of a directory, its tensors' names as they are yielded, and as the language model has them."""
    own = {name: name for name in checkpoint}
    if language_part.settings_of(config) is not config:
        return None, own, _alone(config, checkpoint)
    row = architectures.find(str(config.get("model_type", "")), config)
    full = own if row is None else row.full_names(list(checkpoint))
    return row, full, full


def _alone(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names of a wrapper's tensors as its language model on its own has them; of the others their own."""
    settings = language_part.settings_of(config)
    row = architectures.find(str(settings.get("model_type", "")), settings)
    own = {name: name for name in checkpoint}
    if row is None:
        return own
    part = language_part.find(row, config, checkpoint, row.meant(settings)[row.keys["layers"]])
    return own | {stored: name for name, stored in part.stored.items()}


def _require_zero(checkpoint: Checkpoint, storage: Storage, full: Mapping[str, str], directory: Path) -> frozenset[str]:
    """Return the tensors that some tools write beside packed linears, and that no module of the model has: all zero.

    Args:
        checkpoint: The files.
        storage: How its linears are packed.
        full: Names in the files → names of the model.
        directory: For messages.

    Raises:
        IntegrityError: One isn't zero.
    """
    found = {name for suffix in storage.zeros for name in checkpoint if name.endswith(f".{suffix}")}
    found = {name for name in found if storage.packs(name.rpartition(".")[0], checkpoint)}
    if found:
        known = tensor_shapes(read(directory))
        found = {name for name in found if full[name] not in known}
    for name in sorted(found):
        if checkpoint.read(name).any():
            message = (
                f"{directory}: {name} isn't zero, and the model has no place for it: what it computes would differ"
            )
            raise IntegrityError(message, fix="start from the model before it was quantized")
    return frozenset(found)


def load_state(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the dense state dict of a model directory, floating point tensors as `dtype`, Hugging Face names."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in dequantized_state(directory)}


def rounds_activations(directory: Path) -> frozenset[str]:
    """Return the linears (full names) whose inputs a server rounds to int8, a scale per token, before multiplying."""
    checkpoint = Checkpoint(directory)
    settings: Any = checkpoint.config().get("quantization_config") or {}
    if settings.get("quant_method") != "compressed-tensors":
        return frozenset()
    return frozenset(name.removesuffix(".weight_scale") for name in checkpoint if name.endswith(".weight_scale"))
