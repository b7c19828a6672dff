"""A plan knows every key in advance; a key changes with what decides the result, and with nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from optikit.errors import RecipeError
from optikit.plan import Plan, make_plan
from optikit.plan.render import as_json, render
from optikit.recipe.load import load
from optikit.store.store import Store

Make = Callable[..., Plan]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path, prose: Path, store: Store) -> Make:
    def made(*overrides: str, **changes: Any) -> Plan:
        recipe = {
            "model": str(tiny_llama),
            "calibration": {"text": str(prose), "part": [0.0, 0.7], "samples": 4, "length": 32},
            "stages": [{"quantize": {"method": "gptq", "group_size": 32}}],
            "evaluate": {"perplexity": {"text": str(prose), "part": [0.7, 1.0], "window": 32, "windows": 4}},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | changes), encoding="utf-8")
        return make_plan(load(path, overrides=overrides), store)

    return made


def keys(plan: Plan) -> list[str]:
    return [step.key for step in (*plan.steps, *plan.measures)]


def test_the_same_recipe_has_the_same_keys(make: Make) -> None:
    assert keys(make()) == keys(make())


DECIDING = ("stages[0].quantize.bits=8", "stages[0].quantize.damp=0.02", "seed=1", "calibration.samples=5")


@pytest.mark.parametrize("override", [*DECIDING, "calibration.part=[0, 0.5]"])
def test_what_decides_the_weights_changes_their_key(make: Make, override: str) -> None:
    assert make().steps[0].key != make(override).steps[0].key


@pytest.mark.parametrize("override", ["evaluate.perplexity.windows=3", "timeout=99", "max_memory=8GiB"])
def test_what_does_not_touch_the_weights_keeps_their_key(make: Make, override: str) -> None:
    assert make().steps[0].key == make(override).steps[0].key


def test_only_gates_changed_means_nothing_to_do_again(make: Make) -> None:
    assert keys(make()) == keys(make(gates={"perplexity_ratio": {"max": 1.5}}))


def test_a_moved_model_keeps_its_keys_and_a_changed_one_does_not(make: Make, tiny_llama: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_llama, moved)
    before = keys(make())
    assert keys(make(model=str(moved))) == before
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert keys(make(model=str(moved)))[0] != before[0]


def test_every_measuring_step_reads_the_artifact_it_is_named_for(make: Make) -> None:
    plan = make()
    quantized = plan.steps[0]
    baseline, result = plan.measures
    assert (baseline.name, baseline.source) == ("measure-quality-baseline", "")
    assert (result.name, result.source) == ("measure-quality-1-quantize-gptq", quantized.key)
    assert result.inputs["baseline"] == baseline.key


def test_the_plan_reads_as_a_table_with_totals(make: Make, store: Store) -> None:
    text = render(make(), store)
    assert "1-quantize-gptq" in text
    assert "to do   3 of 3 steps" in text
    assert max(map(len, text.splitlines())) < 140


def test_the_plan_as_data_names_every_step(make: Make, store: Store) -> None:
    data = as_json(make(), store)
    assert [step["cached"] for step in data["steps"]] == [False]
    assert data["steps"][0]["options"]["bits"] == 4


def test_a_memory_bound_that_cannot_hold_is_refused_with_its_place(make: Make) -> None:
    with pytest.raises(RecipeError) as refused:
        make(max_memory="100MiB")
    problem = refused.value.problems[0]
    assert problem.code == "memory-bound"
    assert problem.mark is not None
    assert problem.mark.file.endswith("recipe.yaml")


def test_two_quantizers_are_refused(make: Make) -> None:
    with pytest.raises(RecipeError) as refused:
        make(stages=[{"quantize": {"method": "gptq", "group_size": 32}}, {"quantize": {"method": "rtn"}}])
    assert "needs-trait" in {problem.code for problem in refused.value.problems}


def test_a_distilled_model_learns_from_the_model_before_any_stage(make: Make) -> None:
    stages = [{"prune": {"method": "depth", "ratio": 0.5, "keep_last": 0}}, {"finetune": {"method": "distill"}}]
    prune, distill = make(stages=stages).steps
    assert distill.source == prune.key
    assert distill.inputs == {"teacher": ""}
    assert prune.inputs == {}
    assert {"dense", "shortened", "finetuned"} <= distill.after.traits
    before = make(stages=stages[::-1])
    assert [step.verb for step in before.steps] == ["finetune", "prune"]


def test_heads_read_what_a_model_was_trained_with_and_the_training_is_measured(make: Make, prose: Path) -> None:
    joint: dict[str, Any] = {"finetune": {"method": "medusa2", "heads": 2}}
    rest: list[dict[str, Any]] = [
        {"quantize": {"method": "gptq", "group_size": 32}},
        {"speculate": {"method": "medusa", "heads": 2, "prompts": str(prose)}},
        {"compile": {"engine": "onnxruntime"}},
    ]
    gates = {"perplexity_ratio": {"max": 1.1}}
    plan = make(stages=[joint, *rest], gates=gates)
    training, quantize, heads, _ = plan.steps
    assert (quantize.source, heads.source) == (training.key, quantize.key)
    assert (heads.inputs, training.inputs, quantize.inputs) == ({"start": training.key}, {}, {})
    assert "finetuned" in training.after.traits
    assert "measure-quality-1-finetune-medusa2" in [step.name for step in plan.measures]
    assert plan.warnings == ()
    assert make(stages=rest, gates=gates).steps[1].inputs == {}
    codes = {problem.code for problem in make(stages=[joint, *rest[:1]]).warnings}
    assert {"medusa-joint-gate", "medusa-joint-unused"} <= codes


@pytest.mark.parametrize("position", [1, 2])
def test_a_model_is_trained_with_heads_before_it_is_quantized_and_before_zeros(make: Make, position: int) -> None:
    joint: dict[str, Any] = {"finetune": {"method": "medusa2"}}
    before: list[dict[str, Any]] = [{"prune": {"method": "magnitude"}}, {"quantize": {"method": "gptq"}}]
    with pytest.raises(RecipeError) as refused:
        make(stages=[*before[position - 1 : position], joint])
    expected = {1: "prune-lora-fills-zeros", 2: "order-finetune-after-quantize"}[position]
    assert expected in {problem.code for problem in refused.value.problems}


def test_attribution_compiles_the_model_before_each_stage_once_and_times_them_in_one_chain(make: Make) -> None:
    stages = [
        {"prune": {"method": "magnitude"}},
        {"quantize": {"method": "rtn", "group_size": 32}},
        {"compile": {"engine": "onnxruntime"}},
    ]
    speed = {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 2}
    evaluate = make().recipe.evaluate.model_dump(mode="json", include={"perplexity"}) | {"speed": speed}
    without = make(stages=stages, evaluate=evaluate)
    plan = make(stages=stages, evaluate=evaluate | {"attribution": True})
    assert keys(without) == [key for key in keys(plan) if key in keys(without)] + [without.measures[-1].key]
    engines = [step for step in plan.measures if step.verb == "compile"]
    assert [step.name for step in engines] == ["engine-baseline", "engine-1-prune-magnitude"]
    assert [step.source for step in engines] == ["", plan.steps[0].key]
    compiled = make(stages=stages[-1:], evaluate={})
    assert engines[0].key == compiled.steps[0].key  # found in the store if the model alone was ever compiled
    timed = plan.measures[-1]
    assert list(timed.options.chain) == ["baseline", "engine-baseline", "engine-1-prune-magnitude", "result"]  # type: ignore[attr-defined]
    assert {step.key for step in engines} <= set(timed.inputs.values())


ON_AN_ENGINE = [{"quantize": {"method": "rtn", "group_size": 32}}, {"compile": {"engine": "onnxruntime"}}]


@pytest.mark.parametrize("attribution", [False, True])
@pytest.mark.parametrize(
    ("runtime", "first"),
    [
        ("transformers", ("baseline", "baseline", "transformers")),
        ("engine", ("baseline", "engine-baseline", "onnxruntime")),
        ("none", None),
    ],
)
def test_speed_is_compared_with_the_baseline_that_the_recipe_names(
    make: Make, runtime: str, first: tuple[str, str, str] | None, *, attribution: bool
) -> None:
    speed = {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 2}
    evaluate = make().recipe.evaluate.model_dump(mode="json", include={"perplexity"}) | {"speed": speed}
    evaluate |= {"baseline": {"runtime": runtime}, "attribution": attribution}
    plan = make(stages=ON_AN_ENGINE, evaluate=evaluate)
    arms = [(arm.name, arm.role, arm.runtime) for arm in plan.measures[-1].options.arms]  # type: ignore[attr-defined]
    chain = plan.measures[-1].options.chain  # type: ignore[attr-defined]
    engine = ("engine-baseline", "engine-baseline", "onnxruntime")
    own = [engine] if attribution and runtime != "engine" else []
    assert arms == [*([first] if first else []), *own, ("result", "result", "onnxruntime")]
    assert list(chain) == ([name for name, _, _ in arms] if attribution else [])
    needed = attribution or runtime == "engine"
    assert [step.name for step in plan.measures if step.verb == "compile"] == ["engine-baseline"] * needed


def test_a_baseline_on_no_engine_is_refused(make: Make) -> None:
    evaluate = make().recipe.evaluate.model_dump(mode="json", include={"perplexity"})
    evaluate |= {"speed": {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 2}, "baseline": {"runtime": "engine"}}
    with pytest.raises(RecipeError) as caught:
        make(stages=ON_AN_ENGINE[:1], evaluate=evaluate)
    assert [problem.code for problem in caught.value.problems] == ["baseline-engine"]
    evaluate["baseline"] = {"runtime": "none"}
    with pytest.raises(RecipeError) as caught:
        make(stages=ON_AN_ENGINE, evaluate=evaluate, gates={"decode_speedup": {"min": 1}})
    assert [problem.code for problem in caught.value.problems] == ["gate-not-measured"]


def test_a_runtime_that_only_measuring_needs_is_missed_at_plan_time(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optikit.plan.measure_steps.find_spec", lambda _: None)
    stages = [{"compile": {"engine": "openvino", "weight_format": "int8"}}]
    with pytest.raises(RecipeError) as caught:
        make(stages=stages)
    (problem,) = (each for each in caught.value.problems if each.level == "error")  # a processor may warn, too
    assert problem.code == "library-missing"
    assert problem.fix == "pip install 'optikit[openvino]', or leave out evaluate"
    assert problem.mark is not None
    assert make(stages=stages, evaluate={}).measures == ()
