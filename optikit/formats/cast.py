"""A checkpoint in another float dtype, copied a few megabytes at a time, and what was lost on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optikit.algorithms.cast import cast
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Entry, finite, read_flat, write_pieces

PIECE = 1 << 20
"""Values that are in memory at a time."""
FIX = "this is a defect of optikit or of the disk: run again, and report it if it stays"


@dataclass
class Lost:
    """What a tensor lost.

    Attributes:
        overflowed: How many values were too large.
        vanished: How many became zero.
        largest: Largest magnitude before.
    """

    overflowed: int = 0
    vanished: int = 0
    largest: float = 0.0


def is_cast(entry: Entry, dtype: torch.dtype) -> bool:
    """Return whether a tensor is of floats in another dtype; packed ones of 8 bits aren't."""
    found = entry.torch_dtype
    return found.is_floating_point and found.itemsize > 1 and found != dtype


def _pieces(name: str, entry: Entry, dtype: torch.dtype, lost: Lost) -> Iterator[Tensor]:
    for piece in read_flat(entry, PIECE):
        done = cast(finite(name, piece, entry.file.parent), dtype)
        lost.overflowed += done.overflowed
        lost.vanished += done.vanished
        lost.largest = max(lost.largest, done.largest)
        yield done.values


def write(path: Path, entries: Mapping[str, Entry], dtype: torch.dtype) -> dict[str, Lost]:
    """Write tensors to one file in a dtype.

    Returns:
        What each lost, by name.

    Raises:
        IntegrityError: One holds NaN or infinity.
    """
    lost = {name: Lost() for name in entries}
    rows = {name: (dtype, entry.shape) for name, entry in entries.items()}
    write_pieces(path, rows, lambda name: _pieces(name, entries[name], dtype, lost[name]))
    return lost


def verify(source: Mapping[str, Entry], written: Mapping[str, Entry], dtype: torch.dtype, left: frozenset[str]) -> None:
    """Hold a checkpoint in a dtype to the one that it was cast from, value by value.

    Args:
        source: What was cast.
        written: What was written.
        dtype: The promised dtype.
        left: Tensors that keep their bytes.

    Raises:
        StageFailedError: Naming the tensor that isn't what was promised.
    """
    if source.keys() != written.keys():
        odd = min(source.keys() ^ written.keys())
        raise StageFailedError(f"{odd} is in only one of source and result", fix=FIX)
    for name, entry in source.items():
        wanted = entry.torch_dtype if name in left else dtype
        found = written[name]
        if found.torch_dtype != wanted or found.shape != entry.shape:
            raise StageFailedError(f"{name} is {found.dtype} {found.shape}, not {wanted} {entry.shape}", fix=FIX)
        parts = read_flat(entry, PIECE)
        pieces = read_flat(found, PIECE)
        same = (_equal(a if name in left else cast(a, dtype).values, b) for a, b in zip(parts, pieces, strict=True))
        if not all(same):
            raise StageFailedError(f"{name} isn't the source's, rounded", fix=FIX)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
