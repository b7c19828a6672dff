"""Sealed outputs tampered with in every way: what `optikit verify` and everything that opens one say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit.app import door, verify
from optikit.errors import InputMissingError, IntegrityError, RefusedError
from optikit.store.manifest import NAME
from tests.app.outputs import CONTENT, fill, seal_output


@pytest.fixture
def out(tmp_path: Path) -> Path:
    fill(tmp_path / "out")
    seal_output(tmp_path / "out")
    return tmp_path / "out"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add(out: Path, name: str) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("x")


def test_what_was_sealed_is_whole(out: Path) -> None:
    found = verify.verify(out)
    assert (found.files, found.damage, found.unsealed) == (len(CONTENT), (), ())


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("change", [flip, Path.unlink, lambda path: os.truncate(path, 1)])
def test_every_file_is_covered(out: Path, name: str, change: Callable[[Path], None]) -> None:
    change(out / name)
    assert [one.path for one in verify.verify(out).damage] == [name]


@pytest.mark.parametrize(
    "name",
    [
        "modeling_x.py",
        "pytorch_model.bin",
        "config.json",
        "genai_config.json",
        "notes.txt",
        ".hidden",
        "serve/run.sh",
        "model/modeling_x.py",
        "compiled/onnxruntime/custom.so",
        "compiled/openvino/openvino_model.xml",
        "speculator/speculator.json",
        "\x1b[31m\nx",
    ],
)
def test_every_added_file_is_told(out: Path, name: str) -> None:
    add(out, name)
    assert [str(one) for one in verify.verify(out).damage] == [f"{name}: not in the manifest"]


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a link": lambda out: (out / "link").symlink_to("recipe.yaml"),
    "a loop": lambda out: (out / "loop").symlink_to("."),
    "a link to a device": lambda out: (out / "model/zero").symlink_to("/dev/zero"),
    "a pipe": lambda out: os.mkfifo(out / "model/pipe"),
    "a link in a file's place": lambda out: (
        (out / "model/config.json").rename(out.parent / "moved"),
        (out / "model/config.json").symlink_to(out.parent / "moved"),
    ),
    "a directory in a file's place": lambda out: (
        (out / "model/config.json").unlink(),
        (out / "model/config.json").mkdir(),
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_plain_file_is_damage(out: Path, name: str) -> None:
    SPECIAL[name](out)
    assert verify.verify(out).damage


SEALS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "a list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 200_000),
    "without files": lambda path: path.write_text('{"schema_version": 1}'),
    "files a list": lambda path: path.write_text('{"schema_version": 1, "files": []}'),
    "a record a number": lambda path: path.write_text('{"schema_version": 1, "files": {"a": 5}}'),
    "leaving": lambda path: path.write_text(
        json.dumps({"schema_version": 1, "files": {"../x": {"size": 1, "sha256": "0" * 64}}})
    ),
    "a figure changed": lambda path: path.write_text(path.read_text().replace('"cpu"', '"gpu"')),
    "a link": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("name", SEALS)
def test_a_damaged_seal_is_refused(out: Path, name: str) -> None:
    SEALS[name](out / NAME)
    with pytest.raises(IntegrityError, match=NAME):
        verify.verify(out)


def test_without_a_seal_there_is_nothing_to_compare(out: Path) -> None:
    (out / NAME).unlink()
    with pytest.raises(InputMissingError, match="never finished"):
        verify.verify(out)
    with pytest.raises(InputMissingError, match="not a directory"):
        verify.verify(out / "recipe.yaml")


def test_outputs_of_the_version_before_are_verified_for_what_they_sealed(tmp_path: Path) -> None:
    fill(tmp_path)
    seal_output(tmp_path, version=1)
    found = verify.verify(tmp_path)
    assert found.damage == ()
    assert set(found.unsealed) == {"recipe.yaml", "optikit.lock", "report.json", "report.md", "report.html"}
    add(tmp_path, "notes.txt")
    flip(tmp_path / "model/model.safetensors")
    assert [one.path for one in verify.verify(tmp_path).damage] == ["model/model.safetensors", "notes.txt"]


# ------------------------------------------------------------------ the door


@pytest.fixture
def compiled(tiny_onnx: Path, tiny_llama: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    shutil.copytree(tiny_onnx, out / "compiled/onnxruntime")
    shutil.copytree(tiny_llama, out / "model")
    seal_output(out)
    return out


def test_a_sealed_output_and_what_is_inside_are_entered(compiled: Path) -> None:
    place = compiled / "compiled/onnxruntime"
    assert door.enter(compiled) == ("onnxruntime", place)
    assert door.enter(place) == ("onnxruntime", place)
    assert door.enter(compiled / "model") == ("transformers", compiled / "model")


@pytest.mark.parametrize("inside", ["", "compiled/onnxruntime", "model"])
@pytest.mark.parametrize("name", ["config.json", "genai_config.json", "speculator/speculator.json", "model/x.py"])
def test_an_output_with_something_added_is_refused_wherever_it_is_entered(
    compiled: Path, name: str, inside: str
) -> None:
    add(compiled, name)
    with pytest.raises(IntegrityError, match="not as it was sealed"):
        door.enter(compiled / inside)


def test_only_what_is_loaded_is_read_but_every_size_is_compared(compiled: Path) -> None:
    flip(compiled / "model/model.safetensors")
    door.enter(compiled)
    with pytest.raises(IntegrityError, match=r"model\.safetensors: sha256 differs"):
        door.enter(compiled / "model")
    flip(compiled / "compiled/onnxruntime/genai_config.json")
    with pytest.raises(IntegrityError, match="genai_config"):
        door.enter(compiled)


def test_an_output_without_its_seal_says_how_to_use_it(compiled: Path) -> None:
    (compiled / NAME).unlink()
    with pytest.raises(IntegrityError, match="isn't sealed") as raised:
        door.enter(compiled)
    assert str(compiled / "compiled/onnxruntime") in raised.value.fix
    assert door.enter(compiled / "compiled/onnxruntime")[0] == "onnxruntime"


def test_a_directory_of_others_needs_no_seal(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    assert door.enter(tmp_path / "model") == ("transformers", tmp_path / "model")
    (tmp_path / NAME).write_text('{"contract": "of somebody else"}')  # beside it, and none of ours
    door.enter(tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    with pytest.raises(RefusedError, match="auto_map"):
        door.enter(tmp_path / "model")
