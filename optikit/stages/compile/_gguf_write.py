"""A model directory as a gguf file, a tensor at a time: first what each will be, then the header, then the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import StageFailedError
from optikit.models import gguf_names
from optikit.models.reader import read, tensor_shapes
from optikit.stages.compile import _gguf_settings, _gguf_tokenizer
from optikit.stages.compile._llama_cpp_options import Kind, Options, dense_kind, fitting, table_kind

if TYPE_CHECKING:
    from torch import Tensor

    from optikit.formats import ggml
    from optikit.formats.checkpoint import Checkpoint
    from optikit.models.facts import ModelFacts
    from optikit.models.traits import Storage
    from optikit.stage import Job

NAME, MODELFILE = "model.gguf", "Modelfile"
GRIDS = ("int4_gptq", "int8_gptq", "int4_awq")
"""Traits whose linears are codes, scales and zero points of an integer grid."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "BF16": 32}
"""`general.file_type` by what most weights are."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A tensor of the file.

    Attributes:
        name: In the file.
        source: In the model directory, as if it were dense; "" where the directory has none.
        kind: Its type.
        shape: (out, in), or (elements,).
        exact: Whether its very weights are in the source; else they were rounded to `kind`.
        load: Reads its bytes, (out, bytes of a row) uint8.
    """

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]
    exact: bool
    load: Callable[[], Tensor]


def write(options: Options, job: Job) -> tuple[Written, ...]:
    """Write `model.gguf` and `Modelfile` to `job.dest`; return what is in the file.

    Raises:
        StageFailedError: A tensor or a tokenizer that gguf has no words for.
    """
    import gguf

    facts = read(job.source)
    tensors = tuple(_tensors(options, job.source, facts))
    writer = gguf.GGUFWriter(job.dest / NAME, _gguf_settings.architecture(facts))
    writer.add_type("model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[_most(tensors)])
    _gguf_settings.add(writer, facts)
    _gguf_tokenizer.add(writer, job.source, facts.vocab, options.pre_tokenizer)
    for each in tensors:
        kind = gguf.GGMLQuantizationType[each.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        columns = each.shape[-1] // block * size
        elements = (*each.shape[:-1], columns)
        count = columns * (each.shape[0] if len(each.shape) > 1 else 1)
        writer.add_tensor_info(each.name, elements, np_uint8(), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in tensors:
        writer.write_tensor_data(each.load().numpy())
    writer.close()
    _write_modelfile(job.dest, job.source, facts)
    return tensors


def np_uint8() -> Any:
    """Return the dtype of raw bytes."""
    import numpy as np

    return np.dtype(np.uint8)


def _most(tensors: tuple[Written, ...]) -> str:
    sizes: dict[str, int] = {}
    for each in tensors:
        if each.kind in FILE_TYPES and len(each.shape) > 1 and each.name.startswith("blk."):
            sizes[each.kind] = sizes.get(each.kind, 0) + each.shape[0] * each.shape[1]
    return max(sizes, key=lambda kind: sizes[kind])


def _tensors(options: Options, source: Path, facts: ModelFacts) -> Iterator[Written]:
    import torch

    from optikit.models import quantization

    checkpoint = opened(source, facts)
    storage = quantization.scheme(checkpoint.config(), source / "config.json")
    family, row = _gguf_settings.architecture(facts), facts.architecture
    for name, shape in tensor_shapes(facts).items():
        written = gguf_names.of_tensor(row, family, name) if row is not None else None
        if written is None:
            raise StageFailedError(f"gguf has no name for {name}", fix="use another engine for this model")
        yield _Maker(options, checkpoint, storage, facts).make(name, written, shape)
    for name, values in _gguf_settings.tables(facts).items():
        table = torch.tensor(values, dtype=torch.float32)
        yield Written(name=name, source="", kind="F32", shape=(len(values),), exact=True, load=_as_bytes(table))


def opened(source: Path, facts: ModelFacts) -> Checkpoint:
    """Return the weights of a directory under the names that its family has for them today."""
    from optikit.formats.checkpoint import Checkpoint

    checkpoint, row = Checkpoint(source), facts.architecture
    names = row.full_names(checkpoint.entries) if row is not None else {}
    checkpoint.entries = {names.get(name, name): entry for name, entry in checkpoint.entries.items()}
    return checkpoint


def _as_bytes(values: Tensor) -> Callable[[], Tensor]:
    return lambda: values.contiguous().view(_uint8())


@cache
def _uint8() -> Any:
    import torch

    return torch.uint8


@dataclass(frozen=True)
class _Maker:
    options: Options
    checkpoint: Checkpoint
    storage: Storage
    facts: ModelFacts

    def make(self, name: str, written: str, shape: tuple[int, ...]) -> Written:
        """Return what a tensor becomes."""
        row = self.facts.architecture
        transposed = row is not None and row.transposed and name.removesuffix(".weight") in self.facts.linears
        shape = tuple(reversed(shape)) if transposed else shape
        order = self._order(name)
        grid = self._grid(name.removesuffix(".weight"))
        if grid is not None:
            kind, load = grid
            return Written(name=written, source=name, kind=kind, shape=shape, exact=True, load=lambda: load(order))
        chosen = self._kind(name, written, shape)

        def rounded() -> Tensor:
            weight = self._dense(name, norm=row is not None and row.norm_offset != 0)
            return _encode(weight if order is None else weight[order], chosen)

        return Written(
            name=written, source=name, kind=chosen, shape=shape, exact=self._keeps(name, chosen), load=rounded
        )

    def _kind(self, name: str, written: str, shape: tuple[int, ...]) -> Kind:
        if len(shape) == 1 or written.startswith("position_embd"):
            return "F32"
        if name.removesuffix(".weight") in self.facts.linears:
            return fitting(dense_kind(self.options, self.facts), shape[-1])
        return table_kind(self.options, self.facts)

    def _keeps(self, name: str, kind: str) -> bool:
        """Return whether a dense tensor's own values fit its type."""
        if name not in self.checkpoint:
            return False
        own = self.checkpoint.entries[name].dtype
        return kind in ("F32", own)

    def _order(self, name: str) -> Tensor | None:
        """Return the order of rows that llama.cpp wants, where it isn't theirs."""
        from optikit.formats import ggml

        facts = self.facts
        if _gguf_settings.architecture(facts) not in gguf_names.PAIRED:
            return None
        heads = {"q_proj": facts.heads, "k_proj": facts.kv_heads}
        module = name.rpartition(".")[0].rpartition(".")[2]
        return ggml.paired(heads[module] * facts.head_dim, heads[module]) if module in heads else None

    def _grid(self, linear: str) -> tuple[str, Callable[[Tensor | None], Tensor]] | None:
        """Return the exact type of a packed linear, and what reads its bytes; None where it has none."""
        from optikit.formats import ggml

        if self.storage.trait not in GRIDS or not self.storage.packs(linear, self.checkpoint):
            return None
        grid, in_order = self._unpacked(linear)
        kind = ggml.exact_type(grid.scales, grid.zeros, bits=self.storage.bits, columns=grid.codes.shape[1])
        if kind is None or not in_order:
            return None

        def load(order: Tensor | None) -> Tensor:
            again, _ = self._unpacked(linear)
            return ggml.pack(again if order is None else again.rows(order), kind)

        return kind, load

    def _unpacked(self, linear: str) -> tuple[ggml.Grid, bool]:
        """Return a packed linear, and whether its groups lie in place."""
        import torch

        from optikit.formats import awq, ggml, gptq

        suffixes = [each for each in (*self.storage.suffixes,) if f"{linear}.{each}" in self.checkpoint]
        tensors = {suffix: self.checkpoint.read(f"{linear}.{suffix}") for suffix in suffixes}
        if self.storage.trait == "int4_awq":
            return ggml.Grid(*awq.unpack(tensors)), True
        grid = ggml.Grid(*gptq.unpack(tensors, self.storage.bits))
        width, groups = grid.codes.shape[1], grid.scales.shape[1]
        usual = torch.arange(width, dtype=torch.int32) // max(1, width // groups)
        return grid, "g_idx" not in tensors or torch.equal(tensors["g_idx"], usual)

    def _dense(self, name: str, *, norm: bool) -> Tensor:
        """Return a tensor (out, in) in float32, as llama.cpp multiplies with it."""
        weight = dense(self.checkpoint, self.storage, self.facts, name)
        return weight + 1 if norm and name.endswith("norm.weight") else weight


def dense(checkpoint: Checkpoint, storage: Storage, facts: ModelFacts, name: str) -> Tensor:
    """Return a tensor of a directory in float32, (out, in) where it is a matrix, packed or not."""
    from optikit.formats import UNPACK

    layer = name.removesuffix(".weight")
    if storage.packs(layer, checkpoint):
        there = [s for s in (*storage.suffixes, *storage.optional) if f"{layer}.{s}" in checkpoint]
        return UNPACK[storage.name]({s: checkpoint.read(f"{layer}.{s}") for s in there}, storage).float()
    weight = checkpoint.read(name).float()
    row = facts.architecture
    return weight.T.contiguous() if row is not None and row.transposed and layer in facts.linears else weight


def _encode(weight: Tensor, kind: str) -> Tensor:
    """Return a float32 tensor in a type of ggml, its rows as bytes; the gguf package rounds."""
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == "F32":
        return weight.contiguous().view(torch.uint8)
    if kind in ("F16", "BF16"):
        held = weight.to(torch.float16 if kind == "F16" else torch.bfloat16)
        if not bool(torch.isfinite(held).all()):
            raise StageFailedError(f"a weight doesn't fit {kind}", fix="use dense: bf16")
        return held.contiguous().view(torch.uint8)
    return torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType[kind]))


def _write_modelfile(dest: Path, source: Path, facts: ModelFacts) -> None:
    """Write what `ollama create NAME -f Modelfile` reads; the chat template is in the file, and Ollama finds it."""
    lines = [f"FROM ./{NAME}", f"PARAMETER num_ctx {min(facts.max_positions, 8192)}"]
    path = source / "generation_config.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = [name for name in ("temperature", "top_p", "top_k") if isinstance(told.get(name), (int, float))]
    lines += [f"PARAMETER {name} {told[name]}" for name in kept if told.get("do_sample")]
    (dest / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
