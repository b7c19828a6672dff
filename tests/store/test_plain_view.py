"""What a published model names as its code is left behind; all else is the model's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from optikit.errors import RefusedError
from optikit.models import headers, intake
from optikit.store import maintenance, plain_view
from optikit.store.sources import resolve_model
from optikit.store.store import Store, directory_digest


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def published(tiny_llama: Path, tmp_path: Path) -> Path:
    place = tmp_path / "published"
    shutil.copytree(tiny_llama, place)
    (place / "modeling_evil.py").write_text("raise SystemExit('imported')\n")
    edit(place / "config.json", auto_map={"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "org/x--m.M"})
    edit(place / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.T", None]})
    return place


def resolved(place: Path, store: Store) -> Any:
    return resolve_model(str(place), store, base=place.parent, offline=True, note=print)


def test_a_model_that_names_code_is_seen_without_it(published: Path, tiny_llama: Path, store: Store) -> None:
    found = resolved(published, store)
    assert found.path != published
    assert {each.name for each in Path(found.path).iterdir()} == set(found.names)
    assert "modeling_evil.py" not in found.names
    intake.admit(found.path)
    assert json.loads((found.path / "config.json").read_text()) == json.loads((tiny_llama / "config.json").read_text())
    for name in found.names:
        if not name.endswith("config.json"):
            assert (found.path / name).read_bytes() == (tiny_llama / name).read_bytes()
    weights = "model.safetensors"
    assert (found.path / weights).samefile(published / weights)  # no second copy of what is large
    again = resolved(published, Store(store.root))
    assert (again.path, again.digest) == (found.path, found.digest)
    assert [entry.path for entry in maintenance.entries(store) if entry.name == found.path.name] == [found.path]
    edit(published / "config.json", rope_theta=12345.0)
    changed = resolved(published, store)
    assert changed.path != found.path
    assert changed.digest != found.digest


def test_digests_of_a_view_are_those_of_its_files(published: Path, store: Store) -> None:
    names = intake.model_files(published)
    view = plain_view.of(published, names, store)
    known = {name: store.digest_file(published / name) for name in names}
    assert directory_digest(plain_view.digests(view, published, known)) == resolved(published, store).digest
    assert plain_view.digests(published, published, known) == known


def test_a_view_of_headers_says_that_they_are(published: Path, store: Store) -> None:
    (published / headers.HOLLOW).write_text("{}")
    assert (resolved(published, store).path / headers.HOLLOW).is_file()
    assert list((store.root / "tmp").iterdir()) == []


def test_a_model_that_names_none_is_read_where_it_lies(tiny_llama: Path, store: Store) -> None:
    assert plain_view.of(tiny_llama, intake.model_files(tiny_llama), store) == tiny_llama


@pytest.mark.parametrize("danger", [{"trust_remote_code": True}, {"model_file": "m.py"}, {"tokenizer": "org/name"}])
def test_other_dangers_are_refused_as_before(published: Path, store: Store, danger: dict[str, Any]) -> None:
    edit(published / "config.json", **danger)
    with pytest.raises(RefusedError, match=next(iter(danger))):
        intake.admit(resolved(published, store).path)


def test_files_are_copied_where_there_are_no_links(
    published: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    found = resolved(published, store)
    assert (found.path / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    assert not (found.path / "model.safetensors").samefile(published / "model.safetensors")
