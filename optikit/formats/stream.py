"""Write a checkpoint whose tensors come one at a time, in any order: none but the newest is ever in memory.

Names, dtypes and shapes are known before the first tensor is, so the headers are written first, as `write_shards` would
write them, and each tensor goes straight to its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

import torch
from torch import Tensor

from optikit.errors import IntegrityError, StageFailedError
from optikit.formats.checkpoint import SHARD_BYTES, Entry, finite, header_of, named_shards, write_index
from optikit.models.facts import TensorFacts

if TYPE_CHECKING:
    from typing_extensions import Buffer

FIX = "this is a defect of the stage: report it with the step's log"


class ShardWriter:
    """A checkpoint that is being written.

    Args:
        directory: Existing directory.
        tensors: Every tensor that will come.
        shard_bytes: Largest shard.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, TensorFacts], *, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        sizes = {name: Entry(directory, each.dtype, each.shape, 0, each.bytes) for name, each in tensors.items()}
        self._files = named_shards(directory, sizes, shard_bytes)
        self._places: dict[str, Entry] = {}
        self._written: set[str] = set()
        for file, names in self._files.items():
            head = header_of(names, sizes)
            at = len(head)
            for name in names:
                entry = sizes[name]
                self._places[name] = Entry(file, entry.dtype, entry.shape, at, at + entry.stop)
                at += entry.stop
            file.write_bytes(head)
            os.truncate(file, at)

    def write(self, name: str, tensor: Tensor) -> None:
        """Bring a tensor to its place.

        Raises:
            IntegrityError: It holds NaN or infinity.
            StageFailedError: It isn't what was promised, or came before.
        """
        self.write_pieces(name, [tensor])

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Bring a tensor to its place that comes in parts, one after the other along its first dimension.

        Raises:
            IntegrityError: It holds NaN or infinity.
            StageFailedError: It isn't what was promised, or came before.
        """
        place, rows = self._places.get(name), 0
        if place is None or name in self._written:
            raise StageFailedError(f"{name} {'came twice' if place else 'was not promised'}", fix=FIX)
        with place.file.open("r+b") as file:
            file.seek(place.start)
            for piece in pieces:
                rows += len(piece) if piece.dim() else 1
                self._check(name, piece, rows, place)
                if piece.numel():
                    file.write(cast("Buffer", piece.contiguous().reshape(-1).view(torch.uint8).numpy()))
        if rows != _rows(place):
            self._refuse(name, f"{(rows, *place.shape[1:])}", place)
        self._written.add(name)

    def _check(self, name: str, piece: Tensor, rows: int, place: Entry) -> None:
        """Hold a part of a tensor, up to a row, to what was promised."""
        fits = piece.dtype == place.torch_dtype and piece.dim() == len(place.shape) and rows <= _rows(place)
        if not fits or piece.shape[1:] != place.shape[1:]:
            self._refuse(name, f"{piece.dtype} {tuple(piece.shape)}", place)
        finite(name, piece, self._directory)

    def _refuse(self, name: str, found: str, place: Entry) -> NoReturn:
        raise StageFailedError(f"{name} is {found}, and {place.dtype} {place.shape} was promised", fix=FIX)

    def finish(self) -> int:
        """Write the index where there are several shards.

        Returns:
            Bytes of all tensors.

        Raises:
            IntegrityError: A promised tensor never came.
        """
        missing = sorted(self._places.keys() - self._written)
        if missing:
            raise IntegrityError(f"{self._directory} lacks {missing[0]}", fix="get the checkpoint again")
        for file in self._files:
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())
        return write_index(self._directory, self._places, self._files)


def _rows(place: Entry) -> int:
    return place.shape[0] if place.shape else 1
