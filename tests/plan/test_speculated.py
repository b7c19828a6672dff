"""Every pair of a speculate method and an engine: the plan says what becomes of the speculator, or refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from optikit import stages
from optikit.deploy import engines
from optikit.errors import RecipeError
from optikit.plan.make import make_plan
from optikit.plan.render import as_json, render
from optikit.recipe.load import load
from optikit.store.store import Store
from tests.conftest import build_tiny_llama

ROOT = Path(__file__).parents[2]
TARGETS = {"neuron": "trn1.2xlarge", "tensorrt": "l4", "tensorrt-llm": "l4"}
OPTIONS = {
    "neuron": {"backend": "nxd-inference", "tensor_parallel": 2, "sequence_length": 128, "batch_size": 1},
    "tensorrt-llm": {"sequence_length": 128},
}
MEDUSA = {"layouts": ["nxdi"], "share_lm_head": False}
"""What NxD Inference's loader wants of heads."""
WITH_DRAFT = {"neuron": {"speculation_length": 5}, "tensorrt-llm": {"speculation": "draft"}}
PAIRS = [(method, engine) for method in stages.methods("speculate") for engine in (*stages.methods("compile"), "")]


def test_every_pair_has_one_row():
    known = [(row.method, row.engine) for row in engines.rows()]
    assert len(known) == len(set(known))
    assert set(PAIRS) <= set(known)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    work = tmp_path_factory.mktemp("models")
    large = build_tiny_llama(work / "large", layers=3)
    return large, build_tiny_llama(work / "small", layers=1)


def recipe(method, engine, models, work):
    """Return the shortest recipe with both: where nothing is compiled, the model is served as it is."""
    large, small = models
    prompts = work / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"one two {i}"}) for i in range(60)))
    options = {"method": method, "prompts": str(prompts), "new_tokens": 16}
    options |= {"model": str(small)} if method == "draft" else {}
    options |= MEDUSA if method == "medusa" and engine == "neuron" else {}
    told = WITH_DRAFT.get(engine, {}) if method == "draft" else {}
    compiled = [{"compile": {"engine": engine, **OPTIONS.get(engine, {}), **told}}] if engine else []
    value = {"model": str(large), "target": TARGETS.get(engine, "cpu"), "stages": [{"speculate": options}, *compiled]}
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.mark.parametrize(("method", "engine"), PAIRS)
def test_the_plan_says_what_becomes_of_a_speculator(method, engine, models, tmp_path):
    row = engines.find(method, engine)
    try:
        plan = make_plan(load(recipe(method, engine, models, tmp_path)), Store(tmp_path / "home"))
    except RecipeError as refused:
        codes = {problem.code: problem.message for problem in refused.problems if problem.level == "error"}
        missing = codes.pop("library-missing", "")  # llama.cpp is in an environment of its own, OpenVINO an extra
        if row.word == "refused":
            assert row.rule in codes
        else:
            assert not codes
            assert missing
        return
    assert row.word != "refused"
    store = Store(tmp_path / "home")
    assert f"drafts  {method}: {engines.said(row)}" in render(plan, store).splitlines()
    assert [told["word"] for told in as_json(plan, store)["speculators"]] == [row.word]
    judged = [step for step in plan.measures if step.method == "speculation"]
    assert len(judged) == (1 if row.word == "used" else 0)
    if row.word == "beside":
        assert engines.loaders(method)


def test_the_table_in_the_examples_is_of_the_rows():
    page = (ROOT / "examples" / "speculation_engines.md").read_text(encoding="utf-8")
    assert "\n".join(engines.markdown()) in page
