"""Checkpoint formats: how weights lie in a directory, whoever wrote them.

`load_state(directory, dtype)` is for runtimes: the dense state dict of any directory that can be read here.
`dequantized_state(directory)` and `AsFloats(directory)` are the same, one tensor at a time.
What a server does to the inputs of quantized linears besides is in activations.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optikit.errors import IntegrityError
from optikit.formats import awq, compressed_tensors, fp4, fp8, gptq, llm_int8, nf4
from optikit.formats.checkpoint import Checkpoint, finite, read_rows
from optikit.models import architectures, language_part, quantization
from optikit.models.architectures import Architecture
from optikit.models.facts import TensorFacts
from optikit.models.reader import read, tensor_shapes
from optikit.models.traits import Storage

Tensors = Mapping[str, Tensor]


def _gptq(tensors: Tensors, storage: Storage) -> Tensor:
    version = 2 if storage.settings.get("checkpoint_format") == "gptq_v2" else 1
    codes, scales, zeros = gptq.unpack(tensors, storage.bits, version=version)
    return gptq.dequantize(codes, scales, zeros, tensors.get("g_idx"))


def _block(storage: Storage) -> tuple[int, int]:
    rows, columns = storage.settings["weight_block_size"]
    return rows, columns


UNPACK: Mapping[str, Callable[[Tensors, Storage], Tensor]] = {
    "int4_gptq": _gptq,
    "int8_gptq": _gptq,
    "gptq": _gptq,
    "int4_awq": lambda tensors, _: gptq.dequantize(*awq.unpack(tensors)),
    "awq": lambda tensors, _: gptq.dequantize(*awq.unpack(tensors)),
    "awq_gemv": lambda tensors, storage: gptq.dequantize(*awq.unpack_gemv(tensors, storage.group_size)),
    "int8_w8a8": lambda tensors, _: compressed_tensors.dequantize(tensors),
    "int_quantized": lambda tensors, _: compressed_tensors.dequantize(tensors),
    "pack_quantized": lambda tensors, storage: compressed_tensors.dequantize_packed(tensors, storage.bits),
    "float_quantized": lambda tensors, _: fp8.dequantize(tensors["weight"], tensors["weight_scale"]),
    "fp8": lambda tensors, _: fp8.dequantize(tensors["weight"], tensors["weight_scale"]),
    "fp8_inverse": lambda tensors, _: fp8.dequantize(tensors["weight"], tensors["weight_scale_inv"]),
    "fp8_block": lambda tensors, s: fp8.dequantize(tensors["weight"], tensors["weight_scale_inv"], _block(s)),
    "modelopt_fp8": lambda tensors, _: fp8.dequantize(tensors["weight"], tensors["weight_scale"]),
    "modelopt_nvfp4": lambda t, _: fp4.dequantize(t["weight"], t["weight_scale"].float() * t["weight_scale_2"]),
    "nvfp4_packed": lambda t, _: fp4.dequantize(
        t["weight_packed"], t["weight_scale"].float() / t["weight_global_scale"]
    ),
    "mxfp4_packed": lambda tensors, _: fp4.dequantize(tensors["weight_packed"], tensors["weight_scale"]),
    "mxfp4": lambda tensors, _: fp4.dequantize_experts(tensors["blocks"], tensors["scales"]),
    "fp8_dynamic": lambda tensors, _: fp8.dequantize(tensors["weight"], tensors["weight_scale"]),
    "fp8_static": lambda tensors, _: fp8.dequantize(tensors["weight"], tensors["weight_scale"]),
    "int4_packed": lambda tensors, storage: compressed_tensors.dequantize_packed(tensors, storage.bits),
    "int8_packed": lambda tensors, storage: compressed_tensors.dequantize_packed(tensors, storage.bits),
    "int8_llm": lambda tensors, _: llm_int8.dequantize(tensors),
    "nf4": lambda tensors, _: nf4.dequantize(tensors),
    "fp4": lambda tensors, _: nf4.dequantize(tensors),
}
"""Tensors by suffix, and how they are stored → weight (out, in) float32, by the row of traits.toml or packings.toml."""


class AsFloats(Mapping[str, Tensor]):
    """A model directory as the float weights that it stands for, by name; each is read when it is asked for.

    Dense tensors come in the dtype they are stored in, dequantized ones in float32. Scales of activations and of caches
    mean nothing to float weights, and aren't there.

    Raises:
        IntegrityError: A tensor holds NaN or infinity, or those of a linear don't go together; when it is read.
        RecipeError: The directory is packed in a format that isn't known here.
    """

    def __init__(self, directory: Path) -> None:
        self.checkpoint = Checkpoint(directory)
        config: Mapping[str, Any] = self.checkpoint.config()
        row, full, alone = _names(config, self.checkpoint)
        self.transposed = row is not None and row.transposed
        self.storage = quantization.scheme(config, directory / "config.json", self.checkpoint)
        self.packed: dict[str, str] = {}
        """Name → the linear as it is stored, of those that are packed."""
        self.left_out: list[str] = []
        self._stored: dict[str, str] = {}
        spare = _require_zero(self.checkpoint, self.storage, alone, directory)
        for name in self.checkpoint:
            if name not in spare:
                self._place(name, full[name])

    def _place(self, stored: str, name: str) -> None:
        """Find out what a stored tensor is, by what it is called in the model."""
        storage = self.storage
        layer, kind = storage.split(stored)
        if storage.drops(stored):
            self.left_out.append(stored)
        elif not storage.packs(layer, self.checkpoint):
            self._stored[name] = stored
        elif kind == storage.suffixes[0]:
            dense = storage.dense_name(name.removesuffix(storage.joint + kind))
            self._stored[dense] = self.packed[dense] = layer

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Tensor:
        layer = self.packed.get(name)
        if layer is None:
            return finite(name, self.checkpoint.read(self._stored[name]), self.checkpoint.directory)
        return finite(name, self._dequantized(layer), self.checkpoint.directory)

    def comes_whole(self, name: str) -> bool:
        """Return whether a tensor isn't one that holds packed experts, which `pieces` reads one at a time."""
        return name not in self.packed or self.storage.joint == "."

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in parts that lie one after the other: of packed stacked experts one at a time."""
        if self.comes_whole(name):
            yield self[name]
            return
        layer, storage = self.packed[name], self.storage
        entries = {suffix: self.checkpoint.entries[storage.tensor(layer, suffix)] for suffix in storage.suffixes}
        for expert in range(entries[self.storage.codes].shape[0]):
            tensors = {suffix: read_rows(entry, expert, expert + 1) for suffix, entry in entries.items()}
            yield finite(name, self._unpacked(layer, tensors), self.checkpoint.directory)

    def facts(self, name: str, dtype: str) -> TensorFacts:
        """Return the shape of a tensor, and its dtype: the one it is stored in, or `dtype` where it is packed."""
        layer = self.packed.get(name)
        if layer is None:
            entry = self.checkpoint.entries[self._stored[name]]
            return TensorFacts(dtype=entry.dtype, shape=entry.shape)
        codes = self.checkpoint.entries[self.storage.tensor(layer, self.storage.codes)].shape
        if len(codes) == 4:  # (experts, out, groups, bytes)
            return TensorFacts(dtype=dtype, shape=(codes[0], 2 * codes[2] * codes[3], codes[1]))
        shape = self._stated.get(layer) or self.storage.shape(layer, self._headers, transposed=False) or (0, 0)
        return TensorFacts(dtype=dtype, shape=shape[::-1] if self.transposed else shape)

    @cached_property
    def _headers(self) -> dict[str, TensorFacts]:
        return {name: TensorFacts(dtype=e.dtype, shape=e.shape) for name, e in self.checkpoint.entries.items()}

    @cached_property
    def _stated(self) -> Mapping[str, tuple[int, int]]:
        wanted = self.storage.states_shape
        return quantization.stated_shapes(self.checkpoint.directory, self._headers) if wanted else {}

    def _dequantized(self, layer: str) -> Tensor:
        storage, checkpoint = self.storage, self.checkpoint
        there = [*storage.suffixes, *(s for s in storage.optional if storage.tensor(layer, s) in checkpoint)]
        tensors = {suffix: checkpoint.read(storage.tensor(layer, suffix)) for suffix in there}
        return self._unpacked(layer, tensors)

    def _unpacked(self, layer: str, tensors: Tensors) -> Tensor:
        storage, checkpoint = self.storage, self.checkpoint
        again, where = "get the checkpoint again, or quantize the model anew", f"{checkpoint.directory}: {layer}"
        try:
            weight = UNPACK[storage.name](tensors, storage)
        except IntegrityError as error:
            raise IntegrityError(f"{where}: {error.message}", fix=error.fix or again) from error
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # sizes that don't go together
            raise IntegrityError(f"{where}: its tensors don't go together: {error}", fix=again) from error
        return weight.T.contiguous() if self.transposed else weight


class _Dequantized(Checkpoint):
    """A packed checkpoint that reads as the dense one that it stands for: names, `in` and `read` are those of that."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._floats = AsFloats(directory)

    def __contains__(self, name: object) -> bool:
        return name in self._floats

    def __iter__(self) -> Iterator[str]:
        return iter(self._floats)

    def read(self, name: str) -> Tensor:
        """Read one tensor, see `AsFloats`."""
        return self._floats[name] if name in self else super().read(name)


def dense(directory: Path) -> Checkpoint:
    """Return the tensors of a model directory as those of the dense model that it stands for."""
    checkpoint = Checkpoint(directory)
    return _Dequantized(directory) if "quantization_config" in checkpoint.config() else checkpoint


def dequantized_state(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a model directory as `AsFloats` has it, one at a time."""
    yield from AsFloats(directory).items()


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
