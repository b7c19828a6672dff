"""The weights of a gguf model as a model directory has them: names, order of rows, norms, experts, some rows at a time.

What `stages/compile/_gguf_write.py` does to tensors is undone here. Never more than a few million weights of a tensor
are in memory, but for those that lie across (GPT-2's), which are turned whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optikit.errors import IntegrityError
from optikit.formats import ggml
from optikit.formats.checkpoint import DTYPES
from optikit.models import gguf_names, gguf_parts, gguf_reader, gguf_tied
from optikit.models.facts import TensorFacts
from optikit.models.gguf_reader import read_gguf
from optikit.models.gguf_rows import read_rows
from optikit.models.reader import tensor_shapes

if TYPE_CHECKING:
    from optikit.models.gguf_header import GgufTensor

PIECE = 1 << 21
"""Weights that are in memory at a time, in float32 and what they are made of."""
FLOATS = frozenset({"F32", "F16", "BF16"})
OUTLYING = 4
"""How much coarser than usual a row is rounded whose blocks have one large weight each: 1.63 / 0.58, and some."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor of the model directory lies: in which tensor of the file, and as which of its experts."""

    tensor: GgufTensor
    expert: int | None = None


class GgufWeights:
    """The tensors of a gguf model, by their names in a model directory.

    Args:
        path: Of the file, or of one part.

    Raises:
        InputMissingError, IntegrityError, RecipeError: As `read_gguf` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = gguf_parts.read(path)
        self.facts = read_gguf(path)
        self._row = gguf_reader.architecture_of(self.header, path)
        self.shapes = tensor_shapes(self.facts)
        self.places = self._places()

    @property
    def twice(self) -> bool:
        """Whether the file has one matrix as embedding and as head."""
        return self.facts.tied and gguf_tied.HEAD in self.header.tensors

    def _places(self) -> Mapping[str, Place]:
        found = {}
        names = gguf_names.places(self._row, self.header.tensors, self.facts.experts)
        for stored, tensor in self.header.tensors.items():
            every = names.get(stored, ())
            for index, name in enumerate(every):
                if name in self.shapes:
                    found[name] = Place(tensor=tensor, expert=index if len(every) > 1 else None)
        return found

    def dtypes(self) -> dict[str, TensorFacts]:
        """Return dtype and shape that every tensor gets: the model's, or float32 where only that holds its values.

        Integer blocks are rounded to the model's; floats of another type are read once to see whether they fit.
        """
        main = gguf_reader.dtype_of(self.header)
        found = {}
        for name, shape in self.shapes.items():
            kind = self.places[name].tensor.type
            fits = main in (kind, "F32") or kind not in FLOATS or self._fits(name, DTYPES[main])
            found[name] = TensorFacts(dtype=main if fits else "F32", shape=shape)
        return found

    def _fits(self, name: str, dtype: torch.dtype) -> bool:
        return all(torch.equal(piece.to(dtype).float(), piece) for piece in self.pieces(name))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the values of a tensor in float32, in order, some rows at a time.

        Raises:
            IntegrityError: Of a matrix that is there twice, a row isn't the same.
        """
        if self.twice and name == f"{self._row.embedding}.weight":
            yield from self._finer()
            return
        place, module = self.places[name], name.rpartition(".")[0]
        if self._row.transposed and module in self.facts.linears and name.endswith(".weight"):
            yield _rows(place.tensor, 0, place.tensor.rows).T.contiguous()
            return
        offset = self._row.norm_offset if name.endswith("norm.weight") else 0.0
        for piece in self._ordered(name, place):
            yield piece - offset if offset else piece

    def _ordered(self, name: str, place: Place) -> Iterator[Tensor]:
        """Yield rows in transformers' order; llama.cpp turns neighbours together in every head of queries and keys."""
        tensor = place.tensor
        paired = self._row.gguf in gguf_names.PAIRED and name.split(".")[-2] in ("q_proj", "k_proj")
        if len(tensor.shape) == 1:
            values = _rows(tensor, 0, 1)
            values = values if len(self.shapes[name]) > 1 else values[0]
            yield values[self._unpaired(len(values))] if paired else values
            return
        count = tensor.rows if place.expert is None else tensor.shape[1]
        first = (place.expert or 0) * count
        width = self.facts.head_dim if paired else 1
        step = max(1, PIECE // tensor.shape[-1] // width) * width
        for start in range(0, count, step):
            rows = _rows(tensor, first + start, min(step, count - start))
            yield rows[self._unpaired(len(rows))] if paired else rows

    def _unpaired(self, rows: int) -> Tensor:
        return torch.argsort(ggml.paired(rows, rows // self.facts.head_dim))

    def _finer(self) -> Iterator[Tensor]:
        """Yield the better rounded one of a matrix that is there twice."""
        header = self.header
        pair = [header.tensors[name] for name in (gguf_tied.finer(header), gguf_tied.coarser(header))]
        count, step = pair[0].rows, max(1, PIECE // pair[0].shape[-1])
        for start in range(0, count, step):
            kept, other = (read_rows(each, start, min(step, count - start)) for each in pair)
            wrong = ~(gguf_tied.distance(kept, other) <= OUTLYING * gguf_tied.explained(header))
            if wrong.any():
                row = start + int(wrong.argmax())
                message = (
                    f"{self.path.name}: embedding and head are one matrix, but for row {row}, where they are apart"
                )
                raise IntegrityError(message, fix="get the file again, or start from the model's safetensors directory")
            yield torch.from_numpy(kept.copy())


def _rows(tensor: GgufTensor, start: int, count: int) -> Tensor:
    return torch.from_numpy(read_rows(tensor, start, count).copy())
