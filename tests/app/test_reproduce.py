"""Locks are read, and an output is made again from its seal alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from optikit.app import reproduce
from optikit.app.run import Request, run_recipe
from optikit.errors import InputMissingError, IntegrityError
from optikit.execution.execute import Settings
from tests.app.outputs import fill, seal_output


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "base.yaml").write_text("model: model\n")
    path = tmp_path / "recipe.yaml"
    path.write_text("extends: base.yaml\nstages:\n  - quantize: {method: rtn, group_size: 32}\n")
    return path


def run(recipe: Path, out: str, *, update_lock: bool = False) -> None:
    request = Request(recipe=recipe, out=recipe.parent / out, progress="none", update_lock=update_lock)
    run_recipe(Request(**{**vars(request), "settings": Settings(threads=1)}))


def test_a_changed_source_is_refused_unless_the_lock_is_updated(recipe: Path) -> None:
    run(recipe, "out")
    run(recipe, "out")
    license_ = recipe.parent / "model" / "LICENSE"
    license_.write_text("new terms")
    with pytest.raises(IntegrityError, match="model changed") as raised:
        run(recipe, "out")
    assert "--update-lock" in raised.value.fix
    run(recipe, "elsewhere")
    run(recipe, "out", update_lock=True)
    run(recipe, "out")
    shutil.copyfile(recipe.parent / "out" / "optikit.lock", recipe.with_name("optikit.lock"))
    run(recipe, "third")
    license_.write_text("newest terms")
    with pytest.raises(IntegrityError, match="model changed"):  # by the lock beside the recipe
        run(recipe, "fourth")
    recipe.with_name("optikit.lock").write_text("[]")
    with pytest.raises(IntegrityError, match=r"optikit\.lock"):
        run(recipe, "fourth")


def test_an_output_is_made_again_from_its_seal(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe, "out")
    out = recipe.parent / "out"
    monkeypatch.chdir("/")
    recipe.unlink()
    recipe.with_name("base.yaml").unlink()
    request = reproduce.Request(directory=out, base=recipe.parent, progress="none")
    found = reproduce.reproduce(request)
    assert found.differing == ()
    assert "model/model.safetensors" in found.same
    assert list((recipe.parent / "home" / "tmp").iterdir()) == []
    said = json.loads((out / "artifact.json").read_text())
    weights = out / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match="not as it was sealed"):
        reproduce.reproduce(request)
    seal_output(out, **{name: said[name] for name in ("optikit", "steps", "recipe", "device")})
    assert reproduce.reproduce(request).differing == ("model/model.safetensors",)
    (recipe.parent / "model" / "LICENSE").write_text("new terms")
    with pytest.raises(IntegrityError, match="model changed"):
        reproduce.reproduce(request)


def test_outputs_of_the_version_before_lack_what_it_takes(recipe: Path) -> None:
    fill(recipe.parent / "old")
    seal_output(recipe.parent / "old", version=1)
    with pytest.raises(InputMissingError, match="neither recipe nor lock"):
        reproduce.reproduce(reproduce.Request(directory=recipe.parent / "old", progress="none"))
