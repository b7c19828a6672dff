"""Safetensors directories, read and written tensor by tensor, against the safetensors library."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optikit.errors import InputMissingError, IntegrityError
from optikit.formats.checkpoint import Checkpoint, locate, read_entry, save_tensors, write_shards


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=draw).bfloat16(),
        "b.weight": torch.randn(7, generator=draw),
        "c.codes": torch.randint(0, 255, (9,), generator=draw, dtype=torch.uint8),
        "d.scales": torch.randn(2, 2, generator=draw).half(),
        "e.index": torch.arange(4, dtype=torch.int32),
        "f.scalar": torch.tensor(3.0),
        "g.empty": torch.zeros(0, 4),
    }


def test_reads_what_the_library_wrote(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.read(name).dtype == tensor.dtype
    with pytest.raises(InputMissingError, match="no tensor 'x'"):
        checkpoint.read("x")


def test_equal_tensors_and_metadata_make_equal_bytes(tmp_path, tensors):
    """safetensors itself writes metadata in another order every time."""
    metadata = {f"key {letter} é": letter for letter in "abcdefghijklmnop"}
    written = set()
    for name in ("a", "b", "c", "d"):
        save_tensors(tmp_path / name, tensors, metadata)
        written.add((tmp_path / name).read_bytes())
    assert len(written) == 1
    assert all(torch.equal(each, tensors[name]) for name, each in load_file(tmp_path / "a").items())
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


def test_one_shard_is_read_by_the_library(tmp_path, tensors):
    save_tensors(tmp_path / "source.safetensors", tensors)
    (tmp_path / "out").mkdir()
    assert write_shards(tmp_path / "out", locate(tmp_path / "source.safetensors")) == [
        tmp_path / "out" / "model.safetensors"
    ]
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_index_hold_everything_once(tmp_path, tensors):
    save_tensors(tmp_path / "source.safetensors", tensors)
    (tmp_path / "out").mkdir()
    files = write_shards(tmp_path / "out", locate(tmp_path / "source.safetensors"), shard_bytes=30)
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    checkpoint = Checkpoint(tmp_path / "out")
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert name in load_file(tmp_path / "out" / index["weight_map"][name])


def test_same_entries_same_bytes(tmp_path, tensors):
    save_tensors(tmp_path / "source.safetensors", tensors)
    written = []
    for attempt in ("one", "two"):
        (tmp_path / attempt).mkdir()
        (file,) = write_shards(tmp_path / attempt, locate(tmp_path / "source.safetensors"))
        written.append(file.read_bytes())
    assert written[0] == written[1]


def test_tensors_stay_aligned_to_their_elements(tmp_path, tensors):
    save_tensors(tmp_path / "source.safetensors", tensors)
    (tmp_path / "out").mkdir()
    (file,) = write_shards(tmp_path / "out", locate(tmp_path / "source.safetensors"))
    for entry in locate(file).values():
        assert entry.start % entry.torch_dtype.itemsize == 0


def test_a_cut_file_is_refused(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    entry = Checkpoint(tmp_path).entries["a.weight"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(IntegrityError):
        Checkpoint(tmp_path)
    path.write_bytes(whole[: entry.start + 4])
    with pytest.raises(IntegrityError, match="ended early"):
        read_entry(entry)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(InputMissingError):
        Checkpoint(tmp_path)


def test_half_written_files_never_appear(tmp_path, tensors, monkeypatch):
    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optikit.formats.checkpoint.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(tmp_path / "block.safetensors", tensors)
    assert not (tmp_path / "block.safetensors").exists()
