"""safetensors headers: names, dtypes, shapes, offsets; checked, and not one weight read.

A file that any of these checks refuses could crash a reader, make it read outside the file, or mean different things to
different readers. Format: 8 bytes little-endian length, that many bytes of JSON, then the data.
Source: https://github.com/huggingface/safetensors (README, "Format"; tensor.rs, `Metadata::validate`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from optikit.errors import InputMissingError, IntegrityError
from optikit.models.facts import DTYPE_BYTES, TensorFacts
from optikit.models.strict_json import FIX, parse_object, read_object

MOST_HEADER_BYTES = 100_000_000
MOST_TENSORS = 2**18
"""Tensors of one file: several times what the largest mixture of experts has in all of its files."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_DIMENSIONS = 64
HOLLOW = ".headers.json"
"""File that marks a directory whose weights have headers and no data: sha256 of every whole file, by name."""
MOST_VALUE_BYTES = 4096
"""Of a tensor that is read while planning."""


def read_header(path: Path) -> dict[str, TensorFacts]:
    """Read and check the header of one safetensors file.

    Raises:
        IntegrityError: Naming the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _length(file.read(8), size)
            return _tensors(file.read(length), size - 8 - length)
    except ValueError as error:
        raise IntegrityError(f"{path}: {error}", fix=FIX) from error


def are_there(directory: Path) -> bool:
    """Return whether a model directory has weights, or says that it should."""
    return any(path.name.endswith((".safetensors", ".safetensors.index.json")) for path in directory.iterdir())


def read_directory(directory: Path) -> Mapping[str, TensorFacts]:
    """Read the headers of all shards of a model directory: tensor name → dtype and shape.

    `model.safetensors` counts where it exists, else the shards that `model.safetensors.index.json` names: as
    transformers reads it.

    Raises:
        InputMissingError: There is neither.
        IntegrityError: A header or the index is wrong, a shard or a tensor is missing, a tensor is there twice.
    """
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise InputMissingError(f"{directory} has neither {SINGLE} nor {INDEX}", fix="name a model directory")
    where = _index(directory / INDEX)
    tensors: dict[str, TensorFacts] = {}
    found: dict[str, str] = {}
    for shard in sorted(set(where.values())):
        if not (directory / shard).is_file():
            raise IntegrityError(f"{directory} lacks {shard}, which {INDEX} names", fix="finish the download")
        for name, facts in read_header(directory / shard).items():
            if name in found:
                raise IntegrityError(f"{directory}: {name!r} is in {found[name]} and in {shard}", fix=FIX)
            found[name], tensors[name] = shard, facts
    for name, shard in where.items():
        if found.get(name) != shard:
            raise IntegrityError(f"{directory}: {INDEX} promises {name!r} in {shard}, which lacks it", fix=FIX)
    return tensors


def read_values(directory: Path, names: Collection[str], *, most_bytes: int = MOST_VALUE_BYTES) -> dict[str, bytes]:
    """Return the bytes of a few small tensors of a directory that `read_directory` accepts, by name.

    Args:
        directory: Where.
        names: Of those that are wanted; others needn't be there.
        most_bytes: Of each.

    Raises:
        IntegrityError: One is larger than what a loader keeps beside a weight.
    """
    found: dict[str, bytes] = {}
    single = (directory / SINGLE).is_file()
    for shard in [SINGLE] if single else sorted(set(_index(directory / INDEX).values())):
        with (directory / shard).open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            rows = parse_object(file.read(length))
            for name in sorted(rows.keys() & set(names)):
                begin, end = rows[name]["data_offsets"]
                if end - begin > most_bytes:
                    raise IntegrityError(f"{directory / shard}: {name!r} has {end - begin} bytes", fix=FIX)
                file.seek(8 + length + begin)
                found[name] = file.read(end - begin)
    return found


def _length(prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        msg = f"{size} bytes are too few for a safetensors file"
        raise ValueError(msg)
    length: int = struct.unpack("<Q", prefix)[0]
    if length > MOST_HEADER_BYTES:
        msg = f"header of {length} bytes is larger than {MOST_HEADER_BYTES}"
        raise ValueError(msg)
    if length > size - 8:
        msg = f"header of {length} bytes is longer than the file"
        raise ValueError(msg)
    return length


def _tensors(header: bytes, data_bytes: int) -> dict[str, TensorFacts]:
    if not header.startswith(b"{"):
        msg = "header doesn't begin with {"
        raise ValueError(msg)
    if header.count(b'"data_offsets"') > MOST_TENSORS:
        msg = f"header of more than {MOST_TENSORS} tensors"
        raise ValueError(msg)
    rows = parse_object(header)
    metadata = rows.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        msg = "__metadata__ isn't a map of text to text"
        raise ValueError(msg)
    spans = []
    tensors = {}
    for name, row in rows.items():
        begin, end, tensors[name] = _tensor(name, row)
        spans.append((begin, end, name))
    _check_spans(sorted(spans), data_bytes)
    return tensors


def _tensor(name: str, row: Any) -> tuple[int, int, TensorFacts]:
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        msg = f"{name!r} needs dtype, shape and data_offsets, and nothing else"
        raise ValueError(msg)
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        msg = f"{name!r} has unknown dtype {dtype!r}"
        raise ValueError(msg)
    if not _are_sizes(shape, MOST_DIMENSIONS) or not _are_sizes(offsets, 2) or len(offsets) != 2:
        msg = f"{name!r} has shape {shape!r} and offsets {offsets!r}: whole numbers from 0 up are wanted"
        raise ValueError(msg)
    begin, end = offsets
    facts = TensorFacts(dtype=dtype, shape=tuple(shape))
    bits = facts.elements * int(DTYPE_BYTES[dtype] * 8)
    if bits != (end - begin) * 8:
        msg = f"{name!r} is {dtype} of shape {shape}, which takes {bits / 8:g} bytes, and has {end - begin}"
        raise ValueError(msg)
    return begin, end, facts


def _are_sizes(values: Any, most: int) -> bool:
    if not isinstance(values, list) or len(values) > most:
        return False
    if not values:
        return True
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) < 2**63


def _check_spans(spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Tensors lie one after the other, without a hole, from the first byte of the data to the last."""
    at = 0
    for begin, end, name in spans:
        if begin != at:
            msg = f"{name!r} begins at byte {begin} of the data, and {at} is expected: a hole or an overlap"
            raise ValueError(msg)
        at = end
    if at != data_bytes:
        msg = f"tensors end at byte {at} of the data, and the file at {data_bytes}"
        raise ValueError(msg)


def _index(path: Path) -> dict[str, str]:
    where = read_object(path, most_bytes=MOST_HEADER_BYTES).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise IntegrityError(f"{path} has no weight_map", fix=FIX)
    for shard in where.values():
        if not _is_shard_name(shard):
            raise IntegrityError(f"{path}: {shard!r} isn't the name of a safetensors file beside it", fix=FIX)
    return where


def _is_shard_name(shard: Any) -> bool:
    if not isinstance(shard, str) or not shard.endswith(".safetensors") or shard.startswith("."):
        return False
    return not set(shard) & set("/\\\0")
