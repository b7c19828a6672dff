"""safetensors headers: what the library writes is read; what could harm or confuse a reader is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from optikit.errors import InputMissingError, IntegrityError
from optikit.models.facts import TensorFacts
from optikit.models.headers import read_directory, read_header

Header = dict[str, Any]
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def raw(path: Path, header: bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def written(path: Path, header: Header, data: bytes = b"") -> Path:
    return raw(path, json.dumps(header).encode(), data)


def accepted_by_the_library(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    metadata=st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=2),
)
def test_what_the_library_writes_is_read(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: np.zeros(shape, DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}, path, metadata)
    expected = {name: TensorFacts(dtype=dtype, shape=tuple(shape)) for name, (dtype, shape) in tensors.items()}
    assert read_header(path) == expected


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
BAD_ROWS: dict[str, Header] = {
    "unknown dtype": {"a": ONE | {"dtype": "F33"}},
    "dtype that is no text": {"a": ONE | {"dtype": ["F32"]}},
    "dtype in lower case": {"a": ONE | {"dtype": "f32"}},
    "negative size": {"a": ONE | {"shape": [-2]}},
    "fraction": {"a": ONE | {"shape": [2.0]}},
    "truth": {"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}},
    "shape that overflows to the right size": {"a": ONE | {"shape": [2**62 + 1, 8]}},
    "size beyond 64 bits": {"a": ONE | {"shape": [2**64, 0], "data_offsets": [0, 0]}},
    "too many dimensions": {"a": ONE | {"shape": [1] * 65 + [2]}},
    "shape that is no list": {"a": ONE | {"shape": 2}},
    "shape too large": {"a": ONE | {"shape": [3]}},
    "shape too small": {"a": ONE | {"shape": [1]}},
    "ends before it begins": {"a": ONE | {"data_offsets": [8, 0]}},
    "negative offset": {"a": ONE | {"data_offsets": [-8, 0]}},
    "three offsets": {"a": ONE | {"data_offsets": [0, 4, 8]}},
    "missing field": {"a": {"dtype": "F32", "shape": [2]}},
    "unknown field": {"a": ONE | {"pickle": "yes"}},
    "row that is no object": {"a": [1]},
    "overlap": {"a": ONE, "b": ONE},
    "partial overlap": {"a": ONE, "b": TWO | {"data_offsets": [4, 12]}},
    "hole": {"a": ONE, "b": TWO | {"data_offsets": [12, 20]}},
    "begins late": {"b": TWO},
    "ends after the file": {"a": ONE | {"shape": [4], "data_offsets": [0, 16]}},
    "metadata that is no map": {"__metadata__": [1], "a": ONE},
    "metadata that is no text": {"__metadata__": {"a": 1}, "a": ONE},
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_wrong_header_is_refused_naming_the_file(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", BAD_ROWS[name], bytes(8))
    with pytest.raises(IntegrityError, match=r"a\.safetensors"):
        read_header(path)


BAD_FILES: dict[str, Callable[[Path], Path]] = {
    "empty file": lambda path: raw(path, b"", length=0),
    "no bytes at all": lambda path: (path.write_bytes(b""), path)[1],
    "seven bytes": lambda path: (path.write_bytes(b"\0" * 7), path)[1],
    "header longer than the file": lambda path: raw(path, b"{}", length=3),
    "header of 2**64 - 1": lambda path: raw(path, b"{}", length=2**64 - 1),
    "header above 100 MB": lambda path: raw(path, b"{}", length=100_000_001),
    "no JSON": lambda path: raw(path, b"{,}"),
    "a list": lambda path: raw(path, b"[]"),
    "leading space": lambda path: raw(path, b" {}"),
    "not UTF-8": lambda path: raw(path, b'{"\xff": 1}'),
    "UTF-16": lambda path: raw(path, '{"a": 1}'.encode("utf-16-le")),
    "trailing text": lambda path: raw(path, b"{}x"),
    "data that no tensor covers": lambda path: raw(path, b"{}", b"x"),
    "nested without end": lambda path: raw(path, b'{"a":' * 100_000),
    "a name twice": lambda path: raw(path, f'{{"a":{json.dumps(ONE)},"a":{json.dumps(ONE)}}}'.encode(), bytes(8)),
    "a field twice": lambda path: raw(
        path, b'{"a":{"dtype":"U8","dtype":"U8","shape":[8],"data_offsets":[0,8]}}', bytes(8)
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_wrong_file_is_refused_naming_it(name: str, tmp_path: Path) -> None:
    path = BAD_FILES[name](tmp_path / "a.safetensors")
    with pytest.raises(IntegrityError, match=r"a\.safetensors"):
        read_header(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_a_spoilt_file_is_refused_or_means_the_same_to_the_library(data: st.DataObject, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "a": ONE, "b": TWO}, bytes(16))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 17))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content)[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        found = read_header(path)
    except IntegrityError:
        return
    assert accepted_by_the_library(path)
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == set(found)
        for name, facts in found.items():
            assert tuple(file.get_slice(name).get_shape()) == facts.shape
            assert file.get_slice(name).get_dtype() == facts.dtype


def shards(directory: Path) -> Header:
    save_file({"a": np.zeros(2, "f4"), "b": np.zeros(3, "i1")}, directory / "model-1.safetensors")
    save_file({"c": np.zeros((2, 2), "f2")}, directory / "model-2.safetensors")
    return {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}


def index(directory: Path, where: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_shards_are_read_together(tmp_path: Path) -> None:
    index(tmp_path, shards(tmp_path))
    assert {name: facts.shape for name, facts in read_directory(tmp_path).items()} == {
        "a": (2,),
        "b": (3,),
        "c": (2, 2),
    }


def test_one_file_counts_before_an_index(tmp_path: Path) -> None:
    index(tmp_path, shards(tmp_path))
    save_file({"z": np.zeros(1, "f4")}, tmp_path / "model.safetensors")
    assert list(read_directory(tmp_path)) == ["z"]


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="has neither"):
        read_directory(tmp_path)


OUTSIDE = ["../model-1.safetensors", "/etc/passwd.safetensors", "sub/model-1.safetensors", "..", "", "model.bin"]
NO_NAMES = [1, None, "a\\model.safetensors", "a\0.safetensors", ".safetensors"]


@pytest.mark.parametrize("shard", [*OUTSIDE, *NO_NAMES])
def test_a_shard_name_that_leaves_the_directory_is_refused(shard: object, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shards(tmp_path)
    index(tmp_path / "model", {"a": shard})
    with pytest.raises(IntegrityError, match="isn't the name of a safetensors file"):
        read_directory(tmp_path / "model")


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    where = shards(tmp_path)
    for wrong, words in (
        (where | {"d": "model-1.safetensors"}, "promises 'd'"),
        (where | {"a": "model-2.safetensors"}, "promises 'a'"),
        (where | {"d": "model-3.safetensors"}, r"lacks model-3\.safetensors"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ):
        index(tmp_path, wrong)
        with pytest.raises(IntegrityError, match=words):
            read_directory(tmp_path)
    save_file({"c": np.zeros(1, "f4"), "e": np.zeros(1, "f4")}, tmp_path / "model-3.safetensors")
    index(tmp_path, where | {"e": "model-3.safetensors"})
    with pytest.raises(IntegrityError, match=r"'c' is in model-2\.safetensors and in model-3\.safetensors"):
        read_directory(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(IntegrityError, match="there twice"):
        read_directory(tmp_path)


def test_a_header_of_a_million_tensors_is_refused_unread(tmp_path: Path) -> None:
    rows = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(2**18 + 1))
    header = ("{" + rows + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(IntegrityError, match="more than 262144 tensors"):
        read_header(tmp_path / "model.safetensors")
