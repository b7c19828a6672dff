"""`serve:`: strict, each server seen by the rules on its own, and a line of the plan that says what it loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from optikit.deploy.bundle import Served
from optikit.deploy.servers import DIRECTORY, SERVERS
from optikit.errors import RecipeError
from optikit.plan import serve_section
from optikit.plan.make import make_plan
from optikit.plan.render import as_json, render
from optikit.recipe.jsonschema import export
from optikit.recipe.load import load, loads
from optikit.recipe.schema import ServeEntry
from optikit.stages import methods
from optikit.store.store import Store
from optikit.targets import rows
from tests.rules import recipes


def planned(directory: Path, serve: object, *, stages: object = (), target: str = "l4"):
    directory.mkdir(exist_ok=True)
    recipes.write_model(directory / "model", {})
    (directory / "prose.txt").write_text(recipes.TEXT, encoding="utf-8")
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "model", "target": target, "stages": list(stages), "serve": serve}))
    store = Store(directory / "store")
    return make_plan(load(path), store), store


def refused(directory: Path, serve: object, **how: object) -> list[tuple[str, str, int | None]]:
    with pytest.raises(RecipeError) as error:
        planned(directory, serve, **how)
    return [(each.code, each.message, each.mark.line if each.mark else None) for each in error.value.problems]


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("serve: vllm", "wrong-type", "must be a list"),
        ("serve: [vlm]", "unknown-server", "unknown server 'vlm'"),
        ("serve: [3]", "wrong-type", "must name a server, not 3"),
        ("serve: [{version: '3.3'}]", "missing-key", "no 'server'"),
        ("serve: [{server: tgi, version: 3.3}]", "wrong-type", "version must be text"),
        ("serve: [{server: tgi, shards: 2}]", "unknown-key", "unknown key 'shards'"),
        ("serve: [{server: vllm, tensor_parallel: 0}]", "out-of-range", "tensor_parallel"),
        ("serve: [{server: vllm, version: newest}]", "", "version"),
    ],
)
def test_it_is_strict(text, code, says):
    with pytest.raises(RecipeError) as error:
        loads(f"model: m\n{text}\n", Path("r.yaml"))
    (problem,) = error.value.problems
    assert says in problem.message
    assert code in ("", problem.code)
    assert problem.mark.line == 2
    assert problem.fix


def test_each_server_is_seen_on_its_own(tmp_path):
    """The stack is refused by one server and loaded by another; a stage's warning that holds for both is told once."""
    stages = [{"quantize": {"method": "rtn", "sym": False, "bits": 4, "group_size": 64}}]
    found = refused(tmp_path, ["tgi", {"server": "vllm", "tensor_parallel": 3}], stages=stages, target="g6.12xlarge")
    codes = [code for code, _, _ in found]
    assert codes.count("tgi-maintenance") == 1
    assert "parallel-heads" in codes
    heads = next(line for code, _, line in found if code == "parallel-heads")
    text = (tmp_path / "recipe.yaml").read_text().splitlines()
    assert "tensor_parallel" in text[heads - 1]


def test_the_plan_says_what_each_loads_and_drafts_with(tmp_path):
    stages = [{"speculate": {"method": "lookup", "prompts": "prose.txt"}}]
    serve = [{"server": "vllm", "version": "0.32.0"}, "tensorrt-llm", {"server": "tgi", "version": "2.0"}]
    plan, store = planned(tmp_path, serve, stages=stages)
    lines = [line for line in render(plan, store).splitlines() if line.startswith("serve   ")]
    assert lines[0].startswith("serve   vllm 0.32.0: loads model/; prompt lookup (lookup, releases >=0.10, source)")
    assert lines[1].startswith("serve   tensorrt-llm: loads model/; its prompt lookup are not used")
    assert "tgi loads them in >=3.3,<3.4" in lines[2]
    assert [each["loads"] for each in as_json(plan, store)["serve"]] == [DIRECTORY, DIRECTORY, DIRECTORY]


def test_a_server_needs_something_to_load_and_a_target_that_runs_it(tmp_path):
    (found,) = refused(tmp_path, ["openvino"], target="cpu")
    assert found[0] == "server-loads-nothing"
    (tmp_path / "other").mkdir()
    (found,) = refused(tmp_path / "other", ["lmi"], target="cpu")
    assert found[0] == "server-not-on-target"


def test_rows_speak_of_what_there_is():
    """What a server loads is a directory or a compile stage's result, and some target runs it."""
    named = {name for target in rows().values() for name in target.engines}
    for server in SERVERS.values():
        assert set(server.loads) <= {DIRECTORY, *methods("compile")}
        assert server.runs_as in {"", *named}


def test_editors_know_it():
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft7Validator(export())
    good = {"model": "m", "serve": ["vllm", {"server": "tgi", "version": "3.3.6", "num_speculative_tokens": 3}]}
    assert not list(check.iter_errors(json.loads(json.dumps(good))))
    for wrong in ([{"server": "tgi", "shards": 2}], ["vlm"], "vllm", [{"version": "3"}]):
        assert list(check.iter_errors({"model": "m", "serve": wrong}))


MODEL = {"hidden": 256, "heads": 8, "kv_heads": 2, "intermediate": 704}


@pytest.mark.parametrize(
    ("server", "options", "degree"),
    [("vllm", {}, 4), ("vllm", {"pipeline_parallel": 2}, 2), ("tgi", {}, 2), ("vllm", {"tensor_parallel": 2}, 2)],
)
def test_a_server_is_judged_and_started_at_the_same_degree(server, options, degree):
    """Where the recipe names none, at the largest that the server takes: 2 key-value heads are 2 GPUs for TGI."""
    facts = SimpleNamespace(**MODEL, cached=0, layers=2)
    asked = SERVERS[server].Options(**options)
    target = rows()["g6.12xlarge"]
    entry = ServeEntry(server=server, options=asked)
    judged = {**serve_section._degree(entry, target, facts), **entry.words}["tensor_parallel"]
    artifact = Served(name="m", folders=frozenset(), files=frozenset(), size=1, context=64, target=target, facts=facts)
    assert artifact.tensor_parallel(entry.row.engine, asked) == judged == degree


def test_floors_are_those_of_the_part_that_serves(tmp_path):
    plan, store = planned(tmp_path, [{"server": "vllm", "tensor_parallel": 2, "batch_size": 4}], target="g6.12xlarge")
    assert "serving on 2 of 4 GPUs of g6.12xlarge, batch 4" in render(plan, store)
    whole, store = planned(tmp_path / "whole", ["vllm"], target="g6.12xlarge")
    assert "serving on g6.12xlarge, batch 1" in render(whole, store)
    one, store = planned(tmp_path / "one", ["transformers"], target="g6.12xlarge")
    assert "serving on 1 of 4 GPUs of g6.12xlarge" in render(one, store)
