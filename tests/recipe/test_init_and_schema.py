"""`optikit init` and `optikit schema`, as processes of their own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from optikit import stages
from optikit.cli.init import init
from optikit.errors import CannotCreateError, Exit, UsageError
from optikit.plan import make_plan
from optikit.recipe.jsonschema import export
from optikit.recipe.load import load
from optikit.recipe.starter import PROSE
from optikit.store.store import Store
from optikit.targets import names, rows

ROOT = Path(__file__).parents[2]


def optikit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optikit", *arguments]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)


def test_init_writes_a_valid_recipe_and_its_schema(tmp_path: Path) -> None:
    done = optikit("init", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.schema.json", "recipe.yaml"]
    text = (tmp_path / "recipe.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    schema = json.loads((tmp_path / "recipe.schema.json").read_text())
    assert schema == export()
    Draft7Validator(schema).validate(yaml.safe_load(text))
    loaded = load(tmp_path / "recipe.yaml")
    assert [(s.verb, s.method) for s in loaded.recipe.stages] == [("quantize", "gptq"), ("compile", "onnxruntime")]
    assert all(len(line) <= 120 or "pypi:" in line for line in text.splitlines())


def test_init_refuses_to_overwrite_with_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    done = optikit("init", cwd=tmp_path)
    assert done.returncode == Exit.CANNOT_CREATE
    assert done.stderr == "error: 'recipe.yaml' is there already\nfix: choose another name, or pass --force\n"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    assert optikit("init", "--force", cwd=tmp_path).returncode == 0
    load(tmp_path / "recipe.yaml")


def test_schema_prints_json(tmp_path: Path) -> None:
    done = optikit("schema", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == export()


@pytest.mark.parametrize(
    "model", ["./m", "../m", "/m", "hf:org/name@main", "123", "no", "a: b # c", "été/模型", '"', "-"]
)
def test_any_model_name_survives(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where none of them is there
    init(tmp_path / "r.yaml", model=model)
    assert load(tmp_path / "r.yaml").recipe.model == model


def test_model_named_from_here_is_named_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    init(Path("recipes/r.yaml"), model="model")
    assert load(Path("recipes/r.yaml")).recipe.model == "../model"
    init(Path("r.yaml"), model="model")
    assert load(Path("r.yaml")).recipe.model == "./model"


def test_targets(tmp_path: Path) -> None:
    init(tmp_path / "r.yaml", model=None, target="l4")
    recipe = load(tmp_path / "r.yaml").recipe
    assert recipe.target == "l4"
    assert [s.verb for s in recipe.stages] == ["quantize"]
    assert recipe.evaluate.speed is None
    with pytest.raises(UsageError, match="unknown target 'cpuu'") as caught:
        init(tmp_path / "s.yaml", model=None, target="cpuu")
    assert caught.value.fix == "did you mean 'cpu'?"


@pytest.mark.parametrize("name", ["r.json", "r", "a\nb.yaml", "a\x1b.yaml"])
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no name for a recipe"):
        init(tmp_path / name, model=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["", "a\nb", "\x1b[31m"])
def test_models_that_are_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no model source"):
        init(tmp_path / "r.yaml", model=model)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "r.yaml").symlink_to(tmp_path / "nowhere")
    for path in (
        tmp_path / "absent/r.yaml",
        tmp_path / "file/r.yaml",
        tmp_path / "r.yaml",
        tmp_path / ("x" * 300 + ".yaml"),
    ):
        with pytest.raises(CannotCreateError) as caught:
            init(path, model=None)
        assert caught.value.fix
    assert not list(tmp_path.glob("*.part"))


def test_a_foreign_schema_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "recipe.schema.json").write_text("{}")
    with pytest.raises(CannotCreateError, match="not ours"):
        init(tmp_path / "r.yaml", model=None)
    assert (tmp_path / "recipe.schema.json").read_text() == "{}"
    init(tmp_path / "r.yaml", model=None, force=True)
    init(tmp_path / "second.yaml", model=None)


def different() -> list[str]:
    """Return names of targets, one of each kind: by device, engines and degrees."""
    kinds = {
        (row.device, row.engines, row.tensor_parallel, row.compute_capability): row.name for row in rows().values()
    }
    return [*kinds.values(), "inf2.48xlarge"]


@pytest.mark.parametrize("target", different())
def test_what_init_writes_plans_on_its_own_target(
    target: str, tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    (tmp_path / "prose.txt").write_text(prose.read_text() * 8)
    init(tmp_path / "r.yaml", model=str(model), target=target)
    written = (tmp_path / "r.yaml").read_text()
    (tmp_path / "r.yaml").write_text(written.replace(PROSE, "prose.txt"))
    loaded = load(tmp_path / "r.yaml", known_targets=names())
    plan = make_plan(loaded, Store.default(), offline=True, note=print)
    assert plan.steps[-1].verb == {"cpu": "compile", "cuda": "quantize", "neuron": "compile"}[plan.target.device]
    override = re.search(r"--set (\S+)", written)
    assert override
    load(tmp_path / "r.yaml", overrides=(override[1],))


def test_init_knows_the_stages_it_writes() -> None:
    assert "gptq" in stages.methods("quantize")
    assert "onnxruntime" in stages.methods("compile")
