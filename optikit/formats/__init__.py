"""Checkpoint formats: how weights lie in a directory, whoever wrote them.

`load_state(directory, dtype)` is for runtimes: the dense state dict of any directory that a stage here can write.
`dequantized_state(directory)` is the same, one tensor at a time.
`rounds_activations(directory)` says whether a server of it rounds the inputs of quantized linears, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optikit.errors import IntegrityError
from optikit.formats import awq, compressed_tensors, gptq, llm_int8, nf4
from optikit.formats.checkpoint import Checkpoint
from optikit.models import architectures


@dataclass(frozen=True)
class _Packing:
    """A way of packing a linear.

    Attributes:
        dialect: Key of `quantization_config` that names the variant, its value here, and what its absence means.
        suffixes: Tensors of a packed linear.
        mark: The one of them that no dense linear has.
        unpack: Tensors by suffix, and bits → weight (out, in) float32.
        optional: Tensors that some packed linears have besides.
    """

    dialect: tuple[str, str, str]
    suffixes: tuple[str, ...]
    mark: str
    unpack: Callable[[Mapping[str, Tensor], int], Tensor]
    optional: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[str, str]:
        """Return the linear and the suffix that a tensor's name is made of; ("", "") where it has no such suffix."""
        found = next((s for s in (*self.suffixes, *self.optional) if name.endswith(f".{s}")), "")
        return (name.removesuffix(f".{found}"), found) if found else ("", "")


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


PACKINGS: Mapping[str, tuple[_Packing, ...]] = {
    "gptq": (_Packing(("checkpoint_format", "gptq", "gptq"), gptq.SUFFIXES, "qweight", _gptq),),
    "awq": (_Packing(("version", "gemm", "gemm"), awq.SUFFIXES, "qweight", _awq),),
    "compressed-tensors": (
        _Packing(("format", "int-quantized", ""), compressed_tensors.SUFFIXES, "weight_scale", _int_quantized),
    ),
    "bitsandbytes": (
        _Packing(("load_in_8bit", "True", "False"), llm_int8.SUFFIXES, "SCB", _llm_int8),
        _Packing(("bnb_4bit_quant_type", "nf4", "fp4"), nf4.SUFFIXES, "weight.absmax", _nf4, nf4.NESTED_SUFFIXES),
    ),
}
"""Packings that can be read, by `quant_method`."""


def _transposed(config: Mapping[str, Any]) -> bool:
    row = architectures.find(str(config.get("model_type", "")))
    return row is not None and row.transposed


def _packing(settings: Mapping[str, Any], directory: Path) -> _Packing | None:
    if not settings:
        return None
    method = settings.get("quant_method")
    rows = PACKINGS.get(str(method), ())
    for row in rows:
        key, wanted, absent = row.dialect
        if str(settings.get(key, absent)) == wanted:
            return row
    told = [f"{key} {settings.get(key)!r}" for key, *_ in (row.dialect for row in rows)]
    method = f"{method} with {', '.join(told)}" if told else method
    raise IntegrityError(f"{directory} is packed as {method!r}", fix=f"formats that can be read: {', '.join(PACKINGS)}")


def dequantized_state(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a model directory, packed linears as the float weight that they stand for.

    Dense tensors come in the dtype they are stored in, dequantized ones in float32, under their Hugging Face names.

    Raises:
        IntegrityError: The directory is packed in a format that no stage here writes.
    """
    checkpoint = Checkpoint(directory)
    config: Mapping[str, Any] = checkpoint.config()
    settings: Mapping[str, Any] = config.get("quantization_config") or {}
    packing = _packing(settings, directory)
    for name in checkpoint:
        layer, kind = packing.split(name) if packing else ("", "")
        if packing is None or f"{layer}.{packing.mark}" not in checkpoint:
            yield name, checkpoint.read(name)
        elif kind == packing.mark:
            there = (*packing.suffixes, *(s for s in packing.optional if f"{layer}.{s}" in checkpoint))
            tensors = {suffix: checkpoint.read(f"{layer}.{suffix}") for suffix in there}
            weight = packing.unpack(tensors, int(settings.get("bits", 0)))
            yield f"{layer}.weight", weight.T.contiguous() if _transposed(config) else weight


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
