"""The recipes that ship: each loads, fits the schema, and says how to run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from optikit import targets
from optikit.recipe.jsonschema import export
from optikit.recipe.load import load
from optikit.recipe.node import plain
from optikit.recipe.yaml12 import compose

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))


def test_there_are_recipes() -> None:
    assert {"quickstart.yaml", "smollm2-135m-gptq-cpu.yaml"} <= {path.name for path in RECIPES}
    assert {path.parent.name for path in RECIPES} == {"recipes", "presets"}
    assert len({path.name for path in RECIPES}) == len(RECIPES), "a file name is a public name"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe(path: Path) -> None:
    loaded = load(path)
    assert targets.find(loaded.recipe.target) is not None
    written = compose(loaded.text, path.name).root
    assert written is not None
    Draft7Validator(export()).validate(plain(written))
    header = re.match("(?:#.*\n)+", loaded.text)
    assert header, "begins with a comment"
    command = rf"optikit run {path.relative_to(ROOT)} --out out/(\w+/)?"
    assert re.search(rf"^# Run:       {command}$", header[0], re.MULTILINE)
    override = re.search(rf"^# Override:  {command} --set (?P<setting>\S+)$", header[0], re.MULTILINE)
    if path.parent.name == "presets":
        return  # written by a command
    assert override
    assert load(path, overrides=[override["setting"]]).recipe != loaded.recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_packages_are_pinned(path: Path) -> None:
    for source in re.findall(r"pypi:\S+", path.read_text(encoding="utf-8")):
        assert re.fullmatch(r"pypi:[a-z0-9-]+==[0-9.]+@sha256:[0-9a-f]{64}#\S+", source), source


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_mean_the_same_to_yaml_1_1(path: Path) -> None:
    # Other tools may read them with PyYAML: nothing in them may hang on the version.
    text = path.read_text(encoding="utf-8")
    root = compose(text, path.name).root
    assert root is not None
    assert plain(root) == yaml.safe_load(text)
