"""`evaluate: {runtime: vllm}` in a plan: one step serves what the stages wrote, where that can be served at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from optikit.errors import RecipeError
from optikit.plan import Plan, make_plan
from optikit.recipe.load import load
from optikit.store.store import Store
from tests.conftest import build_tiny_llama

QUANTIZE = {"quantize": {"method": "gptq", "group_size": 32}}
LOOKUP = {"speculate": {"method": "lookup", "prompts": "prompts.jsonl"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads of 32 channels."""
    return build_tiny_llama(tmp_path_factory.mktemp("model"), hidden=128, intermediate=256)


@pytest.fixture
def make(model: Path, prose: Path, tmp_path: Path) -> Any:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The stone"}\n' * 20)

    def made(stages: list[Any], **evaluate: Any) -> Plan:
        text = {"text": str(prose)}
        recipe = {
            "model": str(model),
            "calibration": {**text, "samples": 4, "length": 32},
            "stages": stages,
            "evaluate": {"runtime": "vllm", "perplexity": {**text, "window": 32, "windows": 4}, **evaluate},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return make_plan(load(path), Store(tmp_path / "home"))

    return made


def test_it_takes_the_place_of_the_last_quality_step(make) -> None:
    plan = make([{"prune": {"method": "magnitude"}}, QUANTIZE])
    baseline, pruned, served = plan.measures
    assert [step.method for step in plan.measures] == ["quality", "quality", "served"]
    assert (served.name, served.environment) == ("measure-quality-2-quantize-gptq", "vllm-cpu")
    assert (served.source, served.inputs["baseline"]) == (plan.steps[-1].key, baseline.key)
    assert pruned.environment is None


def test_it_drafts_with_what_the_recipe_made(make) -> None:
    plan = make([QUANTIZE, LOOKUP])
    assert plan.measures[-1].source == plan.steps[0].key
    assert plan.measures[-1].inputs["speculator"] == plan.steps[1].key


def test_speed_is_timed_against_the_untouched_model_on_the_same_server(make) -> None:
    plan = make([QUANTIZE, LOOKUP], speed={"prompt_tokens": 8, "new_tokens": 4, "repetitions": 3})
    timed = plan.measures[-1]
    assert (timed.name, timed.method, timed.environment) == ("measure-speed", "served_speed", "vllm-cpu")
    assert timed.inputs == {
        "baseline": "",
        "result": plan.steps[0].key,
        "tokenizer": "",
        "speculator": plan.steps[1].key,
    }
    assert [(arm.role, arm.runtime, arm.speculator) for arm in timed.options.arms] == [
        ("baseline", "vllm", ""),
        ("result", "vllm", "speculator"),
    ]
    assert timed.options.repetitions == 3
    assert timed.estimate.peak_bytes > 2e9


def test_without_stages_the_model_itself_is_served(make) -> None:
    served = make([]).measures[-1]
    assert (served.name, served.source) == ("measure-served", "")


def test_what_is_asked_decides_its_key(make) -> None:
    first, second = (make([QUANTIZE], concurrency=levels, speed={}).measures[-2] for levels in ([1], [1, 2]))
    assert first.key != second.key


@pytest.mark.parametrize(
    ("stages", "evaluate", "code"),
    [
        ([QUANTIZE, {"compile": {"engine": "onnxruntime"}}], {}, "compiled-not-served"),
        ([QUANTIZE], {"perplexity": None}, "nothing-to-serve"),
        ([{"quantize": {"method": "gptq", "group_size": 32, "bits": 8}}], {}, "not-served"),
        ([QUANTIZE], {"speed": {"prompt_tokens": 500, "new_tokens": 64}}, "prompt-exceeds-context"),
    ],
)
def test_what_can_not_be_served_is_refused(make, stages, evaluate, code) -> None:
    with pytest.raises(RecipeError) as caught:
        make(stages, **evaluate)
    (problem,) = [each for each in caught.value.problems if each.code == code]
    assert problem.mark is not None
    assert problem.fix


def test_what_is_loaded_is_served_by_vllm_and_drafts_too(make) -> None:
    plan = make([QUANTIZE, LOOKUP], serving={"prompts": "prompts.jsonl", "clients": [1, 2]})
    loaded = plan.measures[-1]
    assert (loaded.name, loaded.method, loaded.environment) == ("measure-serving", "served_load", "vllm-cpu")
    assert (loaded.source, loaded.inputs["speculator"]) == (plan.steps[0].key, plan.steps[1].key)
    assert [step.method for step in plan.measures[-2:]] == ["served", "served_load"]
