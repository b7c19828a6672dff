"""A plan as a file: it runs as long as everything that decides its result is what it was, and says what isn't."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from optikit.app.run import Request, run_recipe
from optikit.errors import InputMissingError, IntegrityError, UsageError
from optikit.plan import frozen, make_plan
from optikit.recipe.load import load
from optikit.store.store import Store

RECIPE = """\
model: model
stages:
  - quantize: {method: rtn, bits: 4, group_size: 32}
evaluate:
  perplexity: {text: prose.txt, window: 32, windows: 4}
"""


@pytest.fixture
def root(tmp_path, tiny_llama, prose, monkeypatch):
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))
    shutil.copytree(tiny_llama, tmp_path / "model")
    shutil.copy(prose, tmp_path / "prose.txt")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def planned(root, **how):
    loaded = load(root / "recipe.yaml", overrides=how.get("overrides", ()))
    return make_plan(loaded, Store.default(), extra_targets=how.get("targets")), loaded


def frozen_file(root, **how):
    plan, loaded = planned(root, **how)
    content = frozen.freeze(plan, loaded, overrides=how.get("overrides", ()), targets=how.get("targets"))
    path = root / "plan.json"
    path.write_text(json.dumps(content))
    return path


def run(path):
    return run_recipe(Request(recipe=path, out=path.with_name("out"), progress="none"))


def test_a_plan_holds_while_nothing_changed(root):
    path = frozen_file(root, overrides=("stages[0].quantize.bits=8",))
    read = frozen.read(path)
    assert (read.overrides, read.recipe) == (("stages[0].quantize.bits=8",), (root / "recipe.yaml").absolute())
    plan, loaded = planned(root, overrides=read.overrides)
    frozen.require_recipe(read, loaded)
    frozen.require_same(read, plan, loaded)
    assert read.content["steps"]["1-quantize-rtn"]["options"]["bits"] == 8


def test_a_changed_recipe_is_refused_by_its_keys(root):
    path = frozen_file(root)
    (root / "recipe.yaml").write_text(RECIPE.replace("bits: 4", "bits: 8"))
    with pytest.raises(IntegrityError, match=r"plan\.json no longer holds: .*recipe\.yaml: stages") as caught:
        run(path)
    assert "optikit plan" in caught.value.fix
    assert not (root / "out").exists()


def test_changed_weights_and_text_are_refused(root):
    path = frozen_file(root)
    weights = root / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    (root / "prose.txt").write_text("another text entirely. " * 100)
    with pytest.raises(IntegrityError, match=r"model\.sha256: .* is now .*texts\.perplexity: "):
        run(path)


def test_a_changed_target_row_is_refused(root):
    rows = root / "mine.toml"
    row = '[my-box]\ndevice = "cpu"\nmemory_gib = {}\n'
    rows.write_text(row.format(16))
    (root / "recipe.yaml").write_text("target: my-box\n" + RECIPE)
    path = frozen_file(root, targets=rows)
    rows.write_text(row.format(8))
    with pytest.raises(IntegrityError, match=r"target\.memory_gib: 16.* is now 8"):
        run(path)


def test_changed_code_and_libraries_are_refused_by_their_cause(root):
    path = frozen_file(root)
    content = json.loads(path.read_text())
    step = content["content"]["steps"]["1-quantize-rtn"]
    step |= {"code": "0" * 64, "key": "1" * 64, "versions": step["versions"] | {"torch": "1.0"}}
    content["content"]["steps"]["measure-quality-baseline"]["key"] = "2" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError) as caught:
        run(path)
    said = caught.value.message
    assert "1-quantize-rtn: optikit's code for it" in said
    assert '1-quantize-rtn: versions.torch: "1.0" is now' in said
    assert "measure-quality-baseline: what it is made from, or this machine" in said
    assert "key" not in said


def test_what_was_planned_is_not_overridden(root):
    path = frozen_file(root)
    with pytest.raises(UsageError, match="part of a plan"):
        run_recipe(Request(recipe=path, out=root / "out", overrides=("seed=1",), progress="none"))


def test_files_that_are_no_plans(root):
    assert frozen.read(root / "recipe.yaml") is None
    other = root / "other.json"
    for text in ("{", "[]", '{"model": "x"}'):
        other.write_text(text)
        assert frozen.read(other) is None
    other.write_text('{"optikit_plan": 99}')
    with pytest.raises(InputMissingError, match="a plan of form 99, this version reads 1"):
        frozen.read(other)
    good = json.loads(frozen_file(root).read_text())
    broken = [{"optikit_plan": 1}, *(good | {name: [5]} for name in ("recipe_path", "overrides", "device", "content"))]
    broken += [good | {"content": {name: "x"}} for name in ("recipe", "steps")]
    for value in broken:
        other.write_text(json.dumps(value))
        with pytest.raises(InputMissingError, match="an incomplete plan"):
            frozen.read(other)
    other.write_text('{"optikit_plan": 1, "a": ' + "[" * 200_000)
    assert frozen.read(other) is None


def test_the_command_writes_what_the_next_one_reads(root):
    from typer.testing import CliRunner

    from optikit.cli.app import app

    out = root / "plan.json"
    done = CliRunner().invoke(app, ["plan", str(root / "recipe.yaml"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert frozen.read(Path(out)).content["model"]["resolved"] == "model"
    refused = CliRunner().invoke(app, ["plan", str(root / "recipe.yaml"), "--out", str(root / "plan.txt")])
    assert isinstance(refused.exception, UsageError)
