"""Safetensors directories, tensor by tensor: read one by name, copy bytes without looking at them, write shards.

A checkpoint larger than memory goes through here: nothing is mapped (an address-space limit holds), and a shard is
written by copying byte ranges of finished files, so that neither a shard nor the model is ever in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from optikit.errors import InputMissingError, IntegrityError
from optikit.fileio import is_intact, keep_checked
from optikit.models import headers

if TYPE_CHECKING:
    from typing_extensions import Buffer

SHARD_BYTES = 5_000_000_000
"""Largest shard, as transformers writes them."""
COPY_BYTES = 1 << 22

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by safetensors name."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `stop` of `file`; or in several parts, one after the other.

    `parts` have the tensor's elements in order, or `made` makes it of them; `start` and `stop` are then 0 and its size.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    parts: tuple[Entry, ...] = ()
    made: Callable[[Sequence[Tensor]], Tensor] | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        return DTYPES[self.dtype]


def locate(path: Path) -> dict[str, Entry]:
    """Return where the tensors of a safetensors file lie, by name.

    Raises:
        IntegrityError: The header is wrong, or promises more than the file holds.
    """
    checked = headers.read_header(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        rows = json.loads(file.read(length))
    base = 8 + length
    return {
        name: Entry(path, facts.dtype, facts.shape, *(base + offset for offset in rows[name]["data_offsets"]))
        for name, facts in checked.items()
    }


def same_bytes(one: Entry, other: Entry) -> bool:
    """Return whether two tensors are equal bit by bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.parts or other.parts:
        return torch.equal(*(read_entry(entry).reshape(-1).view(torch.uint8) for entry in (one, other)))
    left = one.stop - one.start
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        while left > 0:
            count = min(left, COPY_BYTES)
            if a.read(count) != b.read(count):
                return False
            left -= count
    return True


def part_of(entry: Entry, elements: tuple[int, int], shape: tuple[int, ...]) -> Entry:
    """Return where a run of a tensor's elements lies, as a tensor of its own."""
    first, last = (entry.start + index * entry.torch_dtype.itemsize for index in elements)
    return Entry(entry.file, entry.dtype, shape, first, last)


def joined(parts: Sequence[Entry], shape: tuple[int, ...]) -> Entry:
    """Return the tensor whose elements are those of parts, one after the other."""
    size = sum(part.stop - part.start for part in parts)
    return Entry(parts[0].file, parts[0].dtype, shape, 0, size, tuple(parts))


def made_of(parts: Sequence[Entry], shape: tuple[int, ...], made: Callable[[Sequence[Tensor]], Tensor]) -> Entry:
    """Return the tensor that is made of others when it is read."""
    size = math.prod(shape) * parts[0].torch_dtype.itemsize
    return Entry(parts[0].file, parts[0].dtype, shape, 0, size, tuple(parts), made)


def read_rows(entry: Entry, start: int, stop: int) -> Tensor:
    """Read rows `start` to `stop` of one tensor into memory of their own; of one in several parts all are read."""
    if entry.parts:
        return read_entry(entry)[start:stop].clone()
    row = math.prod(entry.shape[1:]) * entry.torch_dtype.itemsize
    shape = (stop - start, *entry.shape[1:])
    return read_entry(replace(entry, shape=shape, start=entry.start + start * row, stop=entry.start + stop * row))


def read_flat(entry: Entry, elements: int) -> Iterator[Tensor]:
    """Read the values of a tensor in order, so many at a time: (n,) each, and fewer at the end of a part."""
    if entry.made is not None:
        yield from torch.split(read_entry(entry).reshape(-1), elements)
        return
    for part in entry.parts:
        yield from read_flat(part, elements)
    if entry.parts:
        return
    size = entry.torch_dtype.itemsize
    for start in range(entry.start, entry.stop, elements * size):
        stop = min(start + elements * size, entry.stop)
        yield read_entry(replace(entry, shape=((stop - start) // size,), start=start, stop=stop))


def read_entry(entry: Entry) -> Tensor:
    """Read one tensor into memory of its own."""
    if entry.made is not None:
        return entry.made([read_entry(part) for part in entry.parts]).reshape(entry.shape)
    if entry.parts:
        return torch.cat([read_entry(part).reshape(-1) for part in entry.parts]).reshape(entry.shape)
    tensor = torch.empty(entry.shape, dtype=entry.torch_dtype)
    if tensor.numel():
        view = memoryview(cast("Buffer", tensor.reshape(-1).view(torch.uint8).numpy()))
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < len(view):
                read = file.readinto(view[done:])
                if not read:
                    raise IntegrityError(f"{entry.file.name} ended early", fix="fetch or write it again")
                done += read
    return tensor


def finite(name: str, tensor: Tensor, where: Path) -> Tensor:
    """Return a tensor if all of it is finite.

    Raises:
        IntegrityError: It holds NaN or infinity; the message names it.
    """
    if tensor.is_floating_point() and not bool(
        torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()
    ):
        message = f"{where}: {name} holds NaN or infinity"
        raise IntegrityError(message, fix="the checkpoint is damaged: get it again, or make it anew")
    return tensor


def _files(directory: Path) -> list[str]:
    if (directory / headers.SINGLE).exists():
        return [headers.SINGLE]
    index = json.loads((directory / headers.INDEX).read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))


class Checkpoint:
    """The safetensors weights of a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        headers.read_directory(directory)  # refuses what is incomplete or contradicts itself
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        for name in _files(directory):
            self.entries.update(locate(directory / name))

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def config(self) -> dict[str, object]:
        """Return config.json."""
        loaded = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        return dict(loaded)

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            InputMissingError: There is no tensor of that name.
        """
        if name not in self.entries:
            raise InputMissingError(f"{self.directory} has no tensor {name!r}", fix="check the model directory")
        return read_entry(self.entries[name])


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a file that appears only when it is complete and on disk; equal tensors make equal bytes.

    Args:
        path: Where.
        tensors: By name.
        metadata: What the header says beside the format.
    """
    partial = path.with_name(path.name + ".part")
    values = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(values, partial, {"format": "pt", **(metadata or {})})
    with partial.open("r+b") as file:
        _sort_metadata(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sort_metadata(file: BinaryIO) -> None:
    """Bring the metadata of a safetensors file in order: safetensors writes them as its hash table has them."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > size:
        raise IntegrityError(f"a header of {size} bytes became one of {len(text)}", fix="report this")
    file.seek(8)
    file.write(text.ljust(size))


def keep_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors for a later process of the same step; `kept_tensors` reads them.

    Their bytes go to the file as they lie in memory: safetensors' own writer makes a copy of them all.
    """
    whole = path.with_name(path.name + ".whole")
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    ordered = sorted(values, key=lambda name: (-values[name].itemsize, name))
    write_pieces(
        whole, {name: (values[name].dtype, values[name].shape) for name in ordered}, lambda name: [values[name]]
    )
    keep_checked(whole, path)


def write_pieces(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], pieces: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write tensors one after the other, each as it comes.

    Args:
        path: The file.
        tensors: Dtype and shape by name.
        pieces: Returns the values of a tensor in order, on the CPU, as one tensor or many.
    """
    entries = {
        name: Entry(path, _NAMES[dtype], tuple(shape), 0, math.prod(shape) * dtype.itemsize)
        for name, (dtype, shape) in tensors.items()
    }
    with path.open("wb") as out:
        out.write(header_of(tensors, entries))
        for name in tensors:
            for piece in pieces(name):
                out.write(memoryview(cast("Buffer", piece.reshape(-1).view(torch.uint8).numpy())))


def kept_tensors(path: Path, note: Callable[[str], None] = lambda _: None) -> dict[str, Tensor] | None:
    """Read what `keep_tensors` wrote; None where there is nothing, or it is damaged, which `note` is told."""
    return {name: read_entry(entry) for name, entry in locate(path).items()} if is_intact(path, note) else None


def _shards(entries: Mapping[str, Entry], limit: int) -> list[list[str]]:
    # Wide dtypes first, as safetensors itself orders them: every tensor stays aligned to its element.
    names = sorted(entries, key=lambda name: (-entries[name].torch_dtype.itemsize, name))
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = entries[name].stop - entries[name].start
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def header_of(names: Iterable[str], entries: Mapping[str, Entry]) -> bytes:
    """Return the first bytes of a safetensors file that holds tensors in this order, up to the first tensor."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        entry = entries[name]
        size = entry.stop - entry.start
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def named_shards(directory: Path, entries: Mapping[str, Entry], limit: int) -> dict[Path, list[str]]:
    """Return the files that a checkpoint of these tensors has, each with its tensors in order."""
    shards = _shards(entries, limit)
    if len(shards) == 1:
        return {directory / headers.SINGLE: shards[0]}
    return {directory / f"model-{i + 1:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards)}


def write_index(directory: Path, entries: Mapping[str, Entry], files: Mapping[Path, Iterable[str]]) -> int:
    """Write the index of a checkpoint that has several files; return the bytes of all its tensors."""
    total = sum(entry.stop - entry.start for entry in entries.values())
    if len(files) > 1:
        located = {name: file.name for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(located.items()))}
        (directory / headers.INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return total


def _write_shard(path: Path, names: Iterable[str], entries: Mapping[str, Entry]) -> None:
    names = list(names)
    with path.open("wb") as out:
        out.write(header_of(names, entries))
        for name in names:
            _copy(name, entries[name], out)


def _copy(name: str, entry: Entry, out: BinaryIO) -> None:
    """Append a tensor's bytes; floats among them have to be finite."""
    if entry.made is not None:
        tensor = finite(name, read_entry(entry), entry.file.parent)
        out.write(memoryview(cast("Buffer", tensor.reshape(-1).view(torch.uint8).numpy())))
        return
    for part in entry.parts:
        _copy(name, part, out)
    if entry.parts:
        return
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        left = entry.stop - entry.start
        while left:
            chunk = bytearray(file.read(min(left, COPY_BYTES)))  # a multiple of every element's size
            if not chunk:
                raise IntegrityError(f"{entry.file.name} ended early", fix="fetch or write it again")
            if entry.torch_dtype.is_floating_point and len(chunk) % entry.torch_dtype.itemsize == 0:
                finite(name, torch.frombuffer(chunk, dtype=entry.torch_dtype), entry.file.parent)
            out.write(chunk)
            left -= len(chunk)


def write_shards(directory: Path, entries: Mapping[str, Entry], *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write tensors that lie in other files as one checkpoint: `model.safetensors`, or shards with an index.

    Returns:
        The files written. Same entries, same bytes.

    Raises:
        IntegrityError: A tensor holds NaN or infinity.
    """
    files = named_shards(directory, entries, shard_bytes)
    for file, names in files.items():
        _write_shard(file, names, entries)
    write_index(directory, entries, files)
    return list(files)
