"""A directory with only config.json plans completely, and runs only with weights; absurd figures are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from optikit.errors import InputMissingError, OptikitError, RecipeError, RefusedError
from optikit.models.reader import read
from optikit.plan import Plan, make_plan
from optikit.plan.render import as_json, render
from optikit.recipe.load import load
from optikit.store.store import Store
from tests.formats.packings import write

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
Planner = Callable[..., Plan]


@pytest.fixture
def planned(tmp_path: Path, prose: Path) -> Planner:
    def made(model: Path, *, weights: bool = False, **changes: Any) -> Plan:
        recipe = {
            "model": str(model),
            "target": "h100",
            "calibration": {"text": str(prose), "samples": 4, "length": 32},
            "stages": [{"quantize": {"method": "gptq", "group_size": 128}}],
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
        return make_plan(load(tmp_path / "recipe.yaml"), Store(tmp_path / "home"), weights=weights)

    return made


def described(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA_70B | changes))
    return directory


def test_config_json_alone_plans_and_runs_only_with_weights(planned: Planner, tmp_path: Path) -> None:
    model = described(tmp_path / "model")
    plan = planned(model)
    assert plan.facts.parameters == pytest.approx(70.55e9, rel=0.01)
    assert plan.facts.weight_bytes == 2 * plan.facts.parameters
    assert len(plan.facts.linears) == 7 * 80
    assert "there is only a config.json: its weights are asked for when it is run" in render(
        plan, Store(tmp_path / "home")
    )
    with pytest.raises(InputMissingError, match="optikit plan"):
        planned(model, weights=True)
    with pytest.raises(InputMissingError):
        read(model)


def test_a_packed_model_plans_from_its_config(planned: Planner, tmp_path: Path) -> None:
    plan = planned(described(tmp_path / "model", quantization_config=BLOCK_FP8))
    assert [step.name for step in plan.steps] == ["0-acquire-dequantize", "1-quantize-gptq"]
    assert "fp8_block" in plan.facts.traits
    assert 0.5 < plan.facts.weight_bytes / (2 * plan.facts.parameters) < 0.6
    assert as_json(plan, Store(tmp_path / "home"))["packing"] == ""  # of formats that no stage here writes


@pytest.mark.parametrize("name", ["gptq_v2", "NVFP4", "gptq 4 bits"])
def test_what_is_planned_with_headers_is_planned_without(
    name: str, planned: Planner, tiny_llama: Path, tmp_path: Path
) -> None:
    write(tiny_llama, tmp_path / "model", name)
    stages = {"stages": [{"quantize": {"method": "gptq", "group_size": 32}}]}
    whole = planned(tmp_path / "model", **stages)
    (tmp_path / "model" / "model.safetensors").unlink()
    little = planned(tmp_path / "model", **stages)
    assert little.facts.linears == whole.facts.linears
    assert [step.name for step in little.steps] == [step.name for step in whole.steps]
    assert [step.after.traits for step in little.steps] == [step.after.traits for step in whole.steps]


ABSURD: dict[str, dict[str, Any]] = {
    "a layer count": {"num_hidden_layers": 10**9},
    "no layers": {"num_hidden_layers": 0},
    "a width that is text": {"hidden_size": "8192"},
    "together too many": {"hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 8000, "head_dim": 128},
    "heads that can't share": {"num_key_value_heads": 7},
    "more of keys than of queries": {"num_key_value_heads": 128},
    "a negative vocabulary": {"vocab_size": -1},
    "a width without heads": {"num_attention_heads": 63, "num_key_value_heads": 63},
    "settings of another family": {"attn_logit_softcapping": 50.0},
    "a packing of no kind": {"quantization_config": {"quant_method": "vptq"}},
    "a packing without bits": {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}},
    "blocks of nothing": {"quantization_config": BLOCK_FP8 | {"weight_block_size": [0, 128]}},
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_figures_are_refused(what: str, planned: Planner, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(described(tmp_path / "model", **ABSURD[what]))
    assert caught.value.fix or caught.value.problems


def test_pickles_are_no_reason_to_plan_from_little(planned: Planner, tmp_path: Path) -> None:
    model = described(tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(RefusedError):
        planned(model)


def test_an_index_without_its_shards_is_no_plan_from_little(planned: Planner, tmp_path: Path) -> None:
    model = described(tmp_path / "model")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(OptikitError):
        planned(model)
