"""The nearest legal recipe: edits keep everything else, and the search finds the cheapest change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from optikit.errors import RecipeError
from optikit.problems import Problem
from optikit.rules import repair as repairing
from optikit.rules import yaml_edit
from optikit.rules.repair import repair

BLOCK = """\
# A model
model: m
stages:
  # first this
  - compile: {engine: onnxruntime}  # for the CPU
  # then that
  - quantize:
      method: gptq  # good
      bits: 4

      group_size: 128  # too wide
# the end
evaluate: {}
"""
FLOW = "stages: [{prune: {method: wanda, sparsity: 0.5}}, {quantize: {method: gptq}}]\n"


def plain(text):
    return yaml.safe_load(text)["stages"]


def test_set_keeps_comments():
    changed = yaml_edit.set_options(BLOCK, 1, {"group_size": 64})
    assert changed == BLOCK.replace("128", "64")


def test_set_adds_what_is_not_written():
    assert plain(yaml_edit.set_options(BLOCK, 0, {"precision": "int4"}))[0] == {
        "compile": {"engine": "onnxruntime", "precision": "int4"}
    }
    changed = yaml_edit.set_options(BLOCK, 1, {"sym": True})
    assert "      group_size: 128  # too wide\n      sym: true\n# the end\n" in changed


def test_set_quotes_what_needs_it():
    changed = yaml_edit.set_options(FLOW, 1, {"note": "a: b", "scale": None})
    assert plain(changed)[1]["quantize"] == {"method": "gptq", "note": "a: b", "scale": None}


def test_drop_from_a_block_and_from_a_flow():
    assert plain(yaml_edit.drop_options(BLOCK, 1, ["bits"]))[1]["quantize"] == {"method": "gptq", "group_size": 128}
    assert plain(yaml_edit.drop_options(FLOW, 0, ["sparsity"]))[0]["prune"] == {"method": "wanda"}
    assert plain(yaml_edit.drop_options(FLOW, 0, ["method"]))[0]["prune"] == {"sparsity": 0.5}


def test_sort_moves_comments_along():
    assert yaml_edit.sort_stages(BLOCK) == (
        "# A model\nmodel: m\nstages:\n"
        "  # then that\n  - quantize:\n      method: gptq  # good\n      bits: 4\n\n      group_size: 128  # too wide\n"
        "  # first this\n  - compile: {engine: onnxruntime}  # for the CPU\n"
        "# the end\nevaluate: {}\n"
    )
    assert yaml_edit.sort_stages(FLOW) is None


def test_remove_a_stage_but_never_the_last():
    assert plain(yaml_edit.remove_stage(BLOCK, 0)) == [{"quantize": {"method": "gptq", "bits": 4, "group_size": 128}}]
    assert plain(yaml_edit.remove_stage(FLOW, 1)) == [{"prune": {"method": "wanda", "sparsity": 0.5}}]
    assert yaml_edit.remove_stage("stages: [{prune: {method: wanda}}]", 0) is None


@pytest.mark.parametrize("text", ["", "model: m", "stages: none", "stages: [1]", "stages: [{a: 1}]", "stages: {", "[]"])
def test_texts_without_stages_stay(text):
    assert yaml_edit.stages(text) is None
    assert yaml_edit.sort_stages(text) is None
    assert yaml_edit.remove_stage(text, 0) is None
    assert yaml_edit.set_options(text, 0, {"a": 1}) is None
    assert repair(text, [Problem(code="x", message="m")], lambda _: ()) is None


STAGE = st.fixed_dictionaries(
    {"method": st.sampled_from(["gptq", "rtn"])}, optional={"bits": st.sampled_from([4, 8]), "sym": st.booleans()}
)
VERBED = st.sampled_from(["finetune", "prune", "quantize", "speculate", "compile"])
STAGES = st.lists(st.builds(lambda verb, options: {verb: options}, VERBED, STAGE), min_size=1, max_size=4)
STYLE = st.sampled_from([None, True, False])


@given(STAGES, STYLE, st.integers(0, 3))
def test_edits_mean_what_they_say(stages, style, index):
    """Whatever the YAML style, the edited text reads as the edited data."""
    text = yaml.safe_dump({"model": "m", "stages": stages, "seed": 1}, default_flow_style=style, sort_keys=False)
    index %= len(stages)
    (verb,) = stages[index]
    changed = plain(yaml_edit.set_options(text, index, {"group_size": 32}))
    assert changed[index] == {verb: {**stages[index][verb], "group_size": 32}}
    assert changed[:index] + changed[index + 1 :] == stages[:index] + stages[index + 1 :]
    if len(stages) > 1:
        assert plain(yaml_edit.remove_stage(text, index)) == stages[:index] + stages[index + 1 :]
    order = ["prune", "finetune", "quantize", "speculate", "compile"]
    ordered = yaml_edit.sort_stages(text)
    assert (plain(ordered) if ordered else stages) == sorted(stages, key=lambda stage: order.index(next(iter(stage))))


def problems_of(text: str) -> list[Problem]:
    """A planner with two rules: quantize before compile, and groups of 32."""
    stages = plain(text)
    verbs = [next(iter(stage)) for stage in stages]
    found = []
    if verbs != sorted(verbs, key=["quantize", "compile"].index):
        found.append(Problem(code="order-quantize-after-compile", message="", loc=("stages", 1, "quantize")))
    for index, stage in enumerate(stages):
        if "quantize" in stage and stage["quantize"].get("group_size", 64) != 32:
            found.append(Problem(code="g", message="", loc=("stages", index, "quantize", "group_size")))
    return found


def test_two_changes_together():
    found = repair(BLOCK, problems_of(BLOCK), problems_of)
    assert found.changes == ("set group_size: 32 in quantize (gptq)", "put the stages in order")
    assert problems_of(found.text) == []
    for comment in ("# first this", "# for the CPU", "# then that", "# good", "# too wide", "# the end"):
        assert comment in found.text


def test_the_cheapest_change_wins():
    """Setting an option mends it; removing the stage would, too."""
    text = BLOCK.replace("  - compile: {engine: onnxruntime}  # for the CPU\n", "").replace(
        "evaluate", "  - compile: {engine: onnxruntime}\nevaluate"
    )
    found = repair(text, problems_of(text), problems_of)
    assert found.changes == ("set group_size: 32 in quantize (gptq)",)


def test_warnings_do_not_count():
    warning = Problem(code="w", message="", level="warning", loc=("stages", 0, "compile"))
    found = repair(BLOCK, problems_of(BLOCK), lambda text: [*problems_of(text), warning])
    assert found is not None


def test_gives_up():
    hopeless = Problem(code="h", message="", loc=("model",))
    tried = []

    def attempt(text):
        tried.append(text)
        return [hopeless]

    assert repair(BLOCK, [hopeless], attempt, attempts=7) is None
    assert len(tried) <= 7
    assert len(set(tried)) == len(tried)


def test_diff_applies():
    found = repair(BLOCK, problems_of(BLOCK), problems_of)
    diff = found.diff(BLOCK, "r.yaml")
    assert diff.startswith("--- r.yaml\n+++ r.yaml\n@@")
    assert "-      group_size: 128  # too wide\n" in diff


def test_a_broken_recipe_is_repaired_by_the_real_planner(tiny_llama: Path, prose: Path, tmp_path: Path):
    from optikit.plan.make import make_plan
    from optikit.recipe.load import loads
    from optikit.store.store import Store

    store = Store(tmp_path / "store")
    path = tmp_path / "recipe.yaml"

    def attempt(text):
        try:
            make_plan(loads(text, path), store, offline=True)
        except RecipeError as error:
            return error.problems
        return ()

    text = f"""\
model: {tiny_llama}
calibration: {{text: {prose}, samples: 4, length: 32}}
stages:
  - compile: {{engine: onnxruntime}}  # last
  - quantize: {{method: gptq, group_size: 128}}  # 128 doesn't divide 64
"""
    broken = attempt(text)
    assert {problem.code for problem in broken} == {"order-quantize-after-compile", "group-divides-width"}
    found = repair(text, broken, attempt)
    assert found.changes == ("set group_size: 64 in quantize (gptq)", "put the stages in order")
    assert attempt(found.text) == ()
    assert "# last" in found.text


def test_values_of_an_option_come_from_its_type():
    block = yaml_edit.stages("stages: [{quantize: {method: gptq, group_size: 128, mse: true, bits: 4}}]")[0]
    assert list(repairing._values(block, "mse")) == [False]
    assert list(repairing._values(block, "bits")) == [8]
    assert next(repairing._values(block, "group_size")) == 64
    assert list(repairing._values(block, "colour")) == []


def test_values_that_a_problem_proposes_are_tried_nearest_first():
    text = "stages: [{compile: {engine: neuron, tensor_parallel: 6}}]\n"
    proposed = {"compile": {"tensor_parallel": (1, 2, 8, 24)}}
    problem = Problem(code="cores", message="", loc=("stages", 0, "compile", "tensor_parallel"), repair=proposed)
    tried = [change.told for change in repairing.candidates(text, [problem])]
    assert [told.split()[2] for told in tried[:4]] == ["8", "2", "1", "24"]


def test_several_options_are_combined():
    text = "stages: [{compile: {engine: neuron, batch_size: 4}}]\n"
    problem = Problem(code="fit", message="", repair={"compile": {"batch_size": (1, 2), "tensor_parallel": 8}})
    tried = [change.told for change in repairing.candidates(text, [problem])][:2]
    assert [told.partition(" in ")[0] for told in tried] == [
        "set batch_size: 2, tensor_parallel: 8",
        "set batch_size: 1, tensor_parallel: 8",
    ]
