"""GGUF headers: metadata, tensor names, types and shapes, checked; token lists are skipped, no weight is read.

The `gguf` package's own reader takes seconds for a file with 50,000 tokens, and planning has one second in all.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optikit.errors import IntegrityError
from optikit.models.strict_json import FIX

MAGIC = b"GGUF"
MOST_ENTRIES = 100_000
"""Largest number of metadata entries, or of tensors, that isn't absurd."""
MOST_STRING = 2**26
MOST_VALUE_BYTES = 2**16
"""Of a tensor that is read while planning."""
MOST_KEPT = 16
"""Arrays longer than this (token lists) are counted, not kept."""

BLOCKS: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
    }
)
"""Tensor type by number: name, elements per block, bytes per block. Types that aren't listed are refused."""

_SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor: type name, shape in PyTorch's order (out, in), bytes, and where the first one is in which file."""

    type: str
    shape: tuple[int, ...]
    bytes: int
    start: int = 0
    file: Path = Path()

    @property
    def rows(self) -> int:
        """How many rows it is stored as: one where it is a vector, those of all experts where it stacks them."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a gguf file says of itself; of long arrays nothing is kept."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_header(path: Path, *, keep: int = MOST_KEPT) -> GgufHeader:
    """Read and check the header of a gguf file.

    Args:
        path: The file.
        keep: Elements that an array may have if it is to be returned; longer ones are ().

    Raises:
        IntegrityError: Naming the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _Reader(content, keep).header()
    except (ValueError, struct.error) as error:
        raise IntegrityError(f"{path}: {error}", fix=FIX) from error
    return replace(header, tensors={name: replace(each, file=path) for name, each in header.tensors.items()})


def read_values(header: GgufHeader, name: str) -> bytes:
    """Return the bytes of a small tensor of a file whose header was read.

    Raises:
        IntegrityError: It is larger than what is read while planning.
    """
    tensor = header.tensors[name]
    if tensor.bytes > MOST_VALUE_BYTES:
        message = f"{tensor.file}: {name} has {tensor.bytes} bytes, more than {MOST_VALUE_BYTES}"
        raise IntegrityError(message, fix=FIX)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.bytes)


class _Reader:
    """A cursor over a mapped file; every step checks that it stays inside."""

    def __init__(self, content: mmap.mmap, keep: int) -> None:
        self._content = content
        self._keep = keep
        self._size = len(content)
        self._at = 0

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            msg = "doesn't begin with GGUF"
            raise ValueError(msg)
        version = self._number("I")
        if version not in (2, 3):
            msg = f"gguf version {version}: only 2 and 3, little-endian, are known"
            raise ValueError(msg)
        tensors, entries = self._count("tensors"), self._count("metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            if key in metadata:
                msg = f"metadata {key!r} is there twice"
                raise ValueError(msg)
            metadata[key] = self._value(self._number("I"), key)
        rows = [self._tensor() for _ in range(tensors)]
        return GgufHeader(metadata=metadata, tensors=self._placed(rows, metadata))

    def _take(self, length: int) -> bytes:
        if length > self._size - self._at:
            msg = f"ends at byte {self._size}, in the middle of its header"
            raise ValueError(msg)
        self._at += length
        return self._content[self._at - length : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _count(self, what: str) -> int:
        count = int(self._number("Q"))
        if count > MOST_ENTRIES:
            msg = f"{count} {what}: more than {MOST_ENTRIES}"
            raise ValueError(msg)
        return count

    def _string(self) -> str:
        length = self._number("Q")
        if length > MOST_STRING:
            msg = f"text of {length} bytes in the header"
            raise ValueError(msg)
        return self._take(length).decode()

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key)
        msg = f"metadata {key!r} has unknown type {kind}"
        raise ValueError(msg)

    def _array(self, key: str) -> tuple[Any, ...]:
        kind, count = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            code = f"<{min(count, self._keep)}{_SCALARS[kind]}"
            width = struct.calcsize("<" + _SCALARS[kind])
            values = struct.unpack(code, self._take(count * width)[: struct.calcsize(code)])
            return values if count <= self._keep else ()
        if kind != _STRING:
            msg = f"metadata {key!r} is an array of type {kind}"
            raise ValueError(msg)
        if count <= self._keep:
            return tuple(self._string() for _ in range(count))
        self._skip_strings(count)
        return ()

    def _skip_strings(self, count: int) -> None:
        """Step over texts; written flat because a vocabulary has a hundred thousand of them."""
        content, at, limit = self._content, self._at, self._size - 8
        length_of = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > limit:
                break
            at += 8 + length_of(content, at)[0]
        else:
            if at <= self._size:
                self._at = at
                return
        msg = f"ends at byte {self._size}, in the middle of a list of texts"
        raise ValueError(msg)

    def _tensor(self) -> tuple[str, GgufTensor, int]:
        name = self._string()
        dimensions = self._number("I")
        if not 1 <= dimensions <= 4:
            msg = f"tensor {name!r} has {dimensions} dimensions"
            raise ValueError(msg)
        shape = tuple(self._number("Q") for _ in range(dimensions))
        kind, offset = self._number("I"), self._number("Q")
        if kind not in BLOCKS:
            msg = f"tensor {name!r} has unknown type {kind}"
            raise ValueError(msg)
        type_name, per_block, block_bytes = BLOCKS[kind]
        if shape[0] % per_block:
            msg = f"tensor {name!r} of shape {shape} isn't made of {type_name} blocks of {per_block}"
            raise ValueError(msg)
        elements = 1
        for size in shape:
            elements *= size
        size = elements // per_block * block_bytes
        return name, GgufTensor(type=type_name, shape=tuple(reversed(shape)), bytes=size), offset

    def _placed(self, rows: list[tuple[str, GgufTensor, int]], metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
        """Check that every tensor lies inside the file, on none of the others; return them by name."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**20:
            msg = f"general.alignment is {alignment!r}"
            raise ValueError(msg)
        data = -(-self._at // alignment) * alignment
        free_from = 0
        for name, tensor, offset in sorted(rows, key=lambda row: row[2]):
            if offset < free_from or data + offset + tensor.bytes > self._size:
                msg = f"tensor {name!r} at {offset} with {tensor.bytes} bytes overlaps another or ends after the file"
                raise ValueError(msg)
            free_from = offset + tensor.bytes
        found = {name: replace(tensor, start=data + offset) for name, tensor, offset in rows}
        if len(found) != len(rows):
            msg = "a tensor is there twice"
            raise ValueError(msg)
        return found
