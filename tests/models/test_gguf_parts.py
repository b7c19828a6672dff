"""gguf models in parts: any is named and all are read; what is missing or lies is told by name."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from optikit.cli.app import main
from optikit.errors import InputMissingError, IntegrityError
from optikit.models import gguf_parts
from optikit.models.gguf_reader import read_gguf
from optikit.stage import Job
from optikit.stages.acquire import gguf as stage
from optikit.store import hub, sources
from optikit.store.store import Store
from tests import families
from tests.models import gguf_files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a model as a.gguf, and in parts as b-0000N-of-00004.gguf."""
    place = tmp_path_factory.mktemp("parts")
    families.model_of("qwen2").save_pretrained(place / "source")
    gguf_files.of_directory(place / "source", place / "a.gguf", "qwen2", "Q8_0")
    gguf_files.of_directory(place / "source", place / "b.gguf", "qwen2", "Q8_0", split=8)
    assert len(list(place.glob("b-*-of-00004.gguf"))) == 4
    return place


def part(place: Path, number: int) -> Path:
    return place / f"b-{number:05}-of-00004.gguf"


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    for path in made.glob("b-*.gguf"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


@pytest.mark.parametrize("number", [1, 3])
def test_the_parts_are_the_whole(made: Path, tmp_path: Path, number: int) -> None:
    whole, split = gguf_parts.read(made / "a.gguf"), gguf_parts.read(part(made, number))
    assert split.tensors.keys() == whole.tensors.keys()
    assert len({tensor.file for tensor in split.tensors.values()}) >= 3
    for source, name in ((made / "a.gguf", "a"), (part(made, number), "b")):
        (tmp_path / name).mkdir()
        stage.run(stage.Options(), Job(source=source, dest=tmp_path / name, scratch=tmp_path))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_missing_part_is_named(copied: Path) -> None:
    part(copied, 3).unlink()
    with pytest.raises(InputMissingError, match=r"one of 4 parts, and b-00003-of-00004\.gguf isn't beside it"):
        read_gguf(part(copied, 1))


def test_parts_that_lie_are_told(copied: Path) -> None:
    for number in (1, 2, 3):
        shutil.copyfile(part(copied, number), copied / f"c-{number:05}-of-00003.gguf")
    with pytest.raises(IntegrityError, match="is one of 4 parts, and by its name it is one of 3"):
        read_gguf(copied / "c-00001-of-00003.gguf")
    part(copied, 2).rename(copied / "kept")
    part(copied, 3).rename(part(copied, 2))
    (copied / "kept").rename(part(copied, 3))
    with pytest.raises(IntegrityError, match=r"b-00002-of-00004\.gguf says that it is part 2 of 4"):
        read_gguf(part(copied, 1))
    shutil.copyfile(part(copied, 1), copied / "alone.gguf")
    with pytest.raises(IntegrityError, match="by its name it is one of 1"):
        read_gguf(copied / "alone.gguf")


def test_counts_and_tensors_have_to_fit(copied: Path) -> None:
    content = part(copied, 1).read_bytes()
    key = b"split.tensors.count"
    at = content.index(key) + len(key) + 4
    part(copied, 1).write_bytes(content[:at] + bytes([content[at] + 1]) + content[at + 1 :])
    with pytest.raises(IntegrityError, match="tells of 28 tensors, and its parts have 27"):
        read_gguf(part(copied, 1))
    part(copied, 1).write_bytes(content)
    twice = next(number for number in (2, 3, 4) if b"blk.1.ffn_up.weight" in part(copied, number).read_bytes())
    other = part(copied, twice).read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight")
    part(copied, twice).write_bytes(other)
    with pytest.raises(IntegrityError, match=r"have the same tensor|there twice"):
        read_gguf(part(copied, 1))


def test_a_source_is_all_of_its_parts(made: Path, copied: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    options = {"base": tmp_path, "offline": True, "note": print}
    first = sources.resolve_model(str(part(copied, 1)), store, **options)  # type: ignore[arg-type]
    second = sources.resolve_model(str(part(copied, 2)), store, **options)  # type: ignore[arg-type]
    assert first.digest == second.digest
    (tmp_path / "only").mkdir()
    for path in copied.glob("b-*.gguf"):
        shutil.copyfile(path, tmp_path / "only" / path.name)
    named = sources.resolve_model(str(tmp_path / "only"), store, **options)  # type: ignore[arg-type]
    assert (named.path.name, named.digest) == (part(made, 1).name, first.digest)
    sources.require_unchanged(second, store)
    with part(copied, 4).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(IntegrityError, match="isn't what it was"):
        sources.require_unchanged(first, store)


def test_a_plan_names_the_missing_part(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPTIKIT_HOME", str(copied / "home"))
    recipe = copied / "recipe.yaml"
    recipe.write_text(f"model: {part(copied, 2)}\ntarget: cpu\nstages:\n  - quantize: {{method: rtn, bits: 4}}\n")
    monkeypatch.setattr(sys, "argv", ["optikit", "plan", str(recipe)])
    codes = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            sys.exit(main())
        codes.append(ended.value.code or 0)
        part(copied, 4).unlink(missing_ok=True)
    assert codes == [0, 66]
    assert "b-00004-of-00004.gguf isn't beside it" in " ".join(capsys.readouterr().err.split())


def test_names() -> None:
    assert hub._parts("Q4/a-00002-of-00002.gguf") == ["Q4/a-00001-of-00002.gguf", "Q4/a-00002-of-00002.gguf"]
    assert gguf_parts.whole(["a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"]) == [
        "a.gguf",
        "b-00001-of-00002.gguf",
    ]
    for name in ("b-00003-of-00002.gguf", "b-00000-of-00002.gguf", "b-1-of-2.gguf"):
        assert list(gguf_parts.names(name)) == [name]


@given(st.text(max_size=12), st.integers(1, 50), st.data())
def test_any_part_names_all(stem: str, count: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, count))
    stem = stem.replace("\n", "") or "a"
    found = list(gguf_parts.names(f"{stem}-{number:05}-of-{count:05}.gguf"))
    assert len(found) == count
    assert found[number - 1] == f"{stem}-{number:05}-of-{count:05}.gguf"
    assert list(gguf_parts.names(found[-1])) == found
