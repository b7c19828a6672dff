"""Paths and texts: what is taken, what is refused, and how a text is cut."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.errors import InputMissingError, IntegrityError, RecipeError, RefusedError
from optikit.recipe.schema import Text
from optikit.store import downloads
from optikit.store.sources import ModelSource, check_lock, cut, lock_entries, resolve_model, resolve_text
from optikit.store.store import Store


def model(spec: str, store: Store, base: Path) -> ModelSource:
    return resolve_model(spec, store, base=base, offline=True, note=print)


def test_a_directory_is_known_by_its_contents_not_its_name(tiny_llama: Path, store: Store, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "copy")
    for name in ("pytorch_model.bin", "modeling.py", "trace.npz", "run.sh", "lib.so", "notes.txt", ".cache.json"):
        (tmp_path / "copy" / name).write_bytes(b"\x80not part of the model")
    one = model(str(tiny_llama), store, tmp_path)
    other = model("copy", store, tmp_path)
    assert (one.kind, one.format, one.path) == ("path", "safetensors", tiny_llama)
    assert other.path == tmp_path / "copy"
    assert other.digest == one.digest
    (tmp_path / "copy" / "LICENSE").write_text("Do good.\n")
    licensed = model("copy", store, tmp_path)
    assert licensed.digest != one.digest  # it goes along, so it counts
    assert set(licensed.names) == {*one.names, "LICENSE"}
    (tmp_path / "copy" / "LICENSE").unlink()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        path = tmp_path / "copy" / name
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        assert model("copy", store, tmp_path).digest != one.digest
        path.write_bytes(before)
    assert model("copy", store, tmp_path).digest == one.digest


def test_a_gguf_file_is_known_by_its_contents(store: Store, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.gguf").write_bytes(b"GGUF")
    found = model("models/a.gguf", store, tmp_path)
    assert (found.format, found.path) == ("gguf", tmp_path / "models" / "a.gguf")
    assert found.digest == hashlib.sha256(b"GGUF").hexdigest()
    assert model("models", store, tmp_path) == ModelSource(
        spec="models", kind="path", format="gguf", path=found.path, digest=found.digest, resolved="models"
    )
    (tmp_path / "models" / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(RecipeError, match="holds 2 gguf files"):
        model("models", store, tmp_path)


def test_paths_start_from_the_recipe_then_from_here(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "recipe").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "a.gguf").write_bytes(b"here")
    assert model("a.gguf", store, tmp_path / "recipe").path.read_bytes() == b"here"
    (tmp_path / "recipe" / "a.gguf").write_bytes(b"recipe")
    assert model("a.gguf", store, tmp_path / "recipe").path.read_bytes() == b"recipe"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "a.pth", "a.ckpt", "a.pkl"])
def test_pickles_are_refused(name: str, store: Store, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02.")
    (tmp_path / "config.json").write_text("{}")
    for spec in (str(tmp_path), name):
        with pytest.raises(RefusedError, match="pickle") as raised:
            model(spec, store, tmp_path)
        assert "safetensors" in raised.value.fix


def test_missing_things_have_a_suggestion(store: Store, tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    with pytest.raises(InputMissingError, match="smollm-135m doesn't exist") as raised:
        model("smollm-135m", store, tmp_path)
    assert raised.value.fix == "did you mean 'smollm2-135m'?"
    with pytest.raises(InputMissingError) as raised:
        model("HuggingFaceTB/SmolLM2-135M", store, tmp_path)
    assert raised.value.fix == "for a repository on the hub write hf:HuggingFaceTB/SmolLM2-135M"
    with pytest.raises(RecipeError, match="neither"):
        model("smollm2-135m", store, tmp_path)
    with pytest.raises(RecipeError, match="paths, hf: or pypi:"):
        model("https://example.com/model", store, tmp_path)
    (tmp_path / "smollm2-135m" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputMissingError, match=r"no config\.json"):
        model("smollm2-135m", store, tmp_path)
    with pytest.raises(RecipeError, match="neither a model directory nor a gguf"):
        model("smollm2-135m/model.safetensors", store, tmp_path)


# ---------------------------------------------------------------------------------------------- texts


def text(store: Store, base: Path, **fields: object):
    return resolve_text(Text.model_validate(fields), store, base=base, offline=True, note=print)


def test_a_text_is_cut_and_kept(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<doc 1>\nÄ rose.\n</doc>\n<doc 2>\nA star.\n</doc>\n")
    whole = text(store, tmp_path, text="a.txt")
    assert whole.path.read_bytes() == (tmp_path / "a.txt").read_bytes()
    assert whole.digest == whole.source_sha256
    found = text(store, tmp_path, text="a.txt", drop_lines=["<doc", "</doc"])
    assert found.path.read_text() == "Ä rose.\nA star.\n"
    assert found.digest == hashlib.sha256(found.path.read_bytes()).hexdigest()
    assert found.path.name == f"{found.digest}.txt"
    assert found.source_sha256 == whole.digest
    assert found.resolved == "a.txt"
    found.path.write_text("damaged")
    assert text(Store(store.root), tmp_path, text="a.txt", drop_lines=["<doc", "</doc"]).path.read_text() == (
        "Ä rose.\nA star.\n"
    )


def test_another_text_at_the_same_path_is_another_text(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    one = text(store, tmp_path, text="a.txt")
    (tmp_path / "a.txt").write_text("two")
    assert text(store, tmp_path, text="a.txt").digest != one.digest


def test_a_mark_at_the_start_is_left_out_and_lines_end_alike(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword\r\nnext\n")
    assert text(store, tmp_path, text="a.txt").path.read_bytes() == b"word\nnext\n"


def test_a_chat_template_with_a_name_is_part_of_a_model(store: Store, tmp_path: Path) -> None:
    (tmp_path / "m" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    digests = [model("m", store, tmp_path).digest]
    for content in ("one", "another"):
        (tmp_path / "m" / "additional_chat_templates" / "rag.jinja").write_text(content)
        digests.append(model("m", store, tmp_path).digest)
    assert len(set(digests)) == 3


def test_half_a_character_in_a_record_is_refused_by_its_number(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(InputMissingError, match=r"a\.jsonl: record 2 holds half a surrogate pair"):
        text(store, tmp_path, text="a.jsonl", template="{text}")


def test_line_ends_within_a_record_are_part_of_it(store: Store, tmp_path: Path) -> None:
    lines = '{"text": "one\u2028two"}\n{"text": "three\u0085four"}\n'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    found = text(store, tmp_path, text="a.jsonl", template="{text};").path.read_text(encoding="utf-8")
    assert found == "one\u2028two;three\u0085four;"


def test_text_that_is_no_text(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(InputMissingError, match="not UTF-8: byte 0xff at offset 3"):
        text(store, tmp_path, text="a.txt")
    (tmp_path / "b.txt").write_text("  \n")
    with pytest.raises(RecipeError, match=r"b\.txt holds no text: it has 3 characters"):
        text(store, tmp_path, text="b.txt")
    (tmp_path / "c.txt").write_text("<doc\n")
    with pytest.raises(RecipeError, match="nothing is left"):
        text(store, tmp_path, text="c.txt", drop_lines=["<doc"])
    with pytest.raises(InputMissingError, match=r"a\.tx doesn't exist") as raised:
        text(store, tmp_path, text="a.tx")
    assert raised.value.fix == "did you mean 'a.txt'?"
    with pytest.raises(InputMissingError, match="not a file"):
        text(store, tmp_path, text=str(tmp_path))


@given(
    content=st.text(alphabet="ab<\n\r\u2028ä", max_size=60),
    edge=st.floats(0, 1),
    drop=st.lists(st.sampled_from(["a", "<", "b<"]), max_size=2),
)
def test_shares_that_meet_make_the_whole(content: str, edge: float, drop: list[str]) -> None:
    parts = cut(content, (0.0, edge), drop) + cut(content, (edge, 1.0), drop)
    assert parts == cut(content, (0.0, 1.0), drop)
    kept = [line for line in content.split("\n") if not line.startswith(tuple(drop))] if drop else content.split("\n")
    assert "".join(kept) == parts.replace("\n", "")


PAIRS = [
    {"question": f"how many {i}?", "context": f"CREATE TABLE t{i} (a)", "answer": f"SELECT {i}"} for i in range(10)
]


@pytest.mark.parametrize("array", [True, False], ids=["array", "lines"])
def test_records_become_text_by_a_template(store: Store, tmp_path: Path, array: bool) -> None:
    (tmp_path / "pairs").write_text(json.dumps(PAIRS, indent=1) if array else "\n".join(map(json.dumps, PAIRS)))
    found = text(store, tmp_path, text="pairs", part=(0.8, 1.0), template="Q {question}\n{answer};\n")
    assert found.path.read_text() == "Q how many 8?\nSELECT 8;\nQ how many 9?\nSELECT 9;\n"
    other = text(store, tmp_path, text="pairs", part=(0.8, 1.0), template="{answer}\n")
    assert other.digest != found.digest
    assert other.source_sha256 == found.source_sha256


def test_records_keep_whole_lines_and_take_other_names(store: Store, tmp_path: Path) -> None:
    (tmp_path / "pairs").write_text("\n".join(map(json.dumps, PAIRS)))
    first, last = (text(store, tmp_path, text="pairs", part=part).path.read_text() for part in ((0, 0.55), (0.55, 1)))
    assert [json.loads(line) for line in (first + last).splitlines()] == PAIRS
    named = text(store, tmp_path, text="pairs", template={"prompt": "{context} {question}", "answer": "{answer}"})
    lines = [json.loads(line) for line in named.path.read_text().splitlines()]
    assert lines[3] == {"prompt": "CREATE TABLE t3 (a) how many 3?", "answer": "SELECT 3"}
    assert len(lines) == 10


def test_a_template_that_records_dont_fill(store: Store, tmp_path: Path) -> None:
    (tmp_path / "pairs").write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps({"question": 3}))
    with pytest.raises(RecipeError, match=r"pairs:2: no text for '\{question\}' in \{\"question\": 3\}"):
        text(store, tmp_path, text="pairs", template="{question}")
    (tmp_path / "prose").write_text("No records here.")
    with pytest.raises(RecipeError, match="prose holds no records"):
        text(store, tmp_path, text="prose", template="{question}")
    with pytest.raises(ValueError, match="names something else than fields"):
        text(store, tmp_path, text="pairs", template="{question.__class__}")


# ---------------------------------------------------------------------------------------------- optikit.lock


def test_a_changed_input_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    sources = [text(store, tmp_path, text="a.txt", part=(0, 0.5)), model("a.gguf", store, tmp_path)]
    entries = lock_entries(sources)
    assert entries["a.txt"] == {"resolved": "a.txt", "sha256": hashlib.sha256(b"one two").hexdigest()}
    check_lock(entries, sources)
    check_lock({}, sources)
    (tmp_path / "a.gguf").write_bytes(b"GGUX")
    with pytest.raises(IntegrityError, match=r"a\.gguf changed"):
        check_lock(entries, [model("a.gguf", store, tmp_path)])


def test_a_compressed_text_is_read_unpacked(store: Store, tmp_path: Path) -> None:
    import gzip

    packed = tmp_path / "prompts.jsonl.gz"
    packed.write_bytes(gzip.compress('{"prompt": "Grüße"}\n'.encode()))
    found = resolve_text(Text(text="prompts.jsonl.gz"), store, base=tmp_path, offline=True, note=print)
    assert found.path.read_text(encoding="utf-8") == '{"prompt": "Grüße"}\n'
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="is damaged"):
        resolve_text(Text(text="prompts.jsonl.gz"), store, base=tmp_path, offline=True, note=print)


@pytest.mark.parametrize("damage", ["pipe", "directory", "deep", "not UTF-8"])
def test_what_is_remembered_of_a_source_can_be_damaged_in_any_way(tmp_path: Path, damage: str) -> None:
    store, key = Store(tmp_path), "0" * 64
    downloads.remember(store, key, {"digest": "x"})
    path = tmp_path / "downloads" / "index" / f"{key}.json"
    path.unlink()
    make = {"pipe": lambda: os.mkfifo(path), "directory": path.mkdir, "deep": lambda: path.write_text("[" * 99_999)}
    make.get(damage, lambda: path.write_bytes(b"\xff"))()
    assert downloads.recall(store, key, "digest") is None
    downloads.remember(store, key, {"digest": "y"})
    assert downloads.recall(store, key, "digest") == {"digest": "y"}
