"""Safetensors directories, tensor by tensor: read one by name, copy bytes without looking at them, write shards.

A checkpoint larger than memory goes through here: nothing is mapped (an address-space limit holds), and a shard is
written by copying byte ranges of finished files, so that neither a shard nor the model is ever in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from optikit.errors import InputMissingError, IntegrityError

if TYPE_CHECKING:
    from typing_extensions import Buffer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Largest shard, as transformers writes them."""
COPY_BYTES = 1 << 22

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by safetensors name."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `stop` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file by name.

    Raises:
        IntegrityError: The file is shorter than its header says, or has no readable header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise IntegrityError(f"{path.name} is cut off inside its header", fix="fetch or write it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise IntegrityError(f"{path.name} has no readable header: {error}", fix="fetch it again") from error
    header.pop("__metadata__", None)
    base = 8 + length
    entries = {
        name: Entry(
            path, row["dtype"], tuple(row["shape"]), base + row["data_offsets"][0], base + row["data_offsets"][1]
        )
        for name, row in header.items()
    }
    end = max((entry.stop for entry in entries.values()), default=base)
    if end > size:
        raise IntegrityError(f"{path.name} has {size} bytes where its header promises {end}", fix="fetch it again")
    return entries


def read_entry(entry: Entry) -> Tensor:
    """Read one tensor into memory of its own."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
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


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [WEIGHTS]
    missing = next((name for name in names if not (directory / name).is_file()), None)
    if missing is not None:
        raise InputMissingError(f"{directory} has no {missing}", fix="give a directory with safetensors weights")
    return [directory / name for name in names]


class Checkpoint:
    """The safetensors weights of a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        for file in _weight_files(directory):
            self.entries.update(read_header(file))

    def __contains__(self, name: str) -> bool:
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


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file that appears only when it is complete and on disk."""
    partial = path.with_name(path.name + ".part")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, {"format": "pt"})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _shards(entries: Mapping[str, Entry], limit: int) -> list[list[str]]:
    # Wide dtypes first, as safetensors itself orders them: every tensor stays aligned to its element.
    names = sorted(entries, key=lambda name: (-DTYPES[entries[name].dtype].itemsize, name))
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


def _write_shard(path: Path, names: Iterable[str], entries: Mapping[str, Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        entry = entries[name]
        size = entry.stop - entry.start
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            entry = entries[name]
            with entry.file.open("rb") as file:
                file.seek(entry.start)
                left = entry.stop - entry.start
                while left:
                    chunk = file.read(min(left, COPY_BYTES))
                    if not chunk:
                        raise IntegrityError(f"{entry.file.name} ended early", fix="fetch or write it again")
                    out.write(chunk)
                    left -= len(chunk)


def write_shards(directory: Path, entries: Mapping[str, Entry], *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write tensors that lie in other files as one checkpoint: `model.safetensors`, or shards with an index.

    Returns:
        The files written. Same entries, same bytes.
    """
    shards = _shards(entries, shard_bytes)
    if len(shards) == 1:
        _write_shard(directory / WEIGHTS, shards[0], entries)
        return [directory / WEIGHTS]
    files = [directory / f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        _write_shard(file, names, entries)
    total = sum(entry.stop - entry.start for entry in entries.values())
    located = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(located.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return files
