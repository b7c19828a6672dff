"""Presets: every one plans, its figures are those of the run that it names, and nothing is claimed without one."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from optikit.app import presets, recommend
from optikit.app.presets import NOT_RECORDED
from optikit.cli.app import app
from optikit.errors import RecipeError, UsageError
from optikit.plan import make_plan
from optikit.recipe.load import load
from optikit.store.store import Store

ROOT = Path(__file__).parents[2]
path = ROOT / "tests" / "benchmarks" / "presets.py"
spec = importlib.util.spec_from_file_location("presets_recorded", path)
assert spec is not None
assert spec.loader is not None
script: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

CONFIGS = {
    "llama-8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "smollm2": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "qwen": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}
"""What the published config.json of Llama 3.1 8B, SmolLM2 135M and Qwen2.5 0.5B say of shapes."""
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of models of which only the configurations are here, and a text."""
    directory = tmp_path_factory.mktemp("presets")
    for name, shape in CONFIGS.items():
        (directory / name).mkdir()
        more = {"max_position_embeddings": 8192, "torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-5}
        config = shape | more | {"architectures": [CLASSES[str(shape["model_type"])]]}
        (directory / name / "config.json").write_text(json.dumps(config))
    (directory / "prose.txt").write_text("the river is cold, and nobody swims in it\n" * 20000)
    return directory


@pytest.mark.parametrize("name", presets.rows())
def test_a_preset_plans_for_its_family(name: str, place: Path) -> None:
    recipe = place / f"{name}.yaml"
    family = name.partition("-cpu")[0].partition("-8b")[0]
    model = place / {"llama": "llama-8b"}.get(family, family)
    command = ["init", str(recipe), "--preset", name, "--model", str(model), "--force"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    written = recipe.read_text(encoding="utf-8")
    text = str(place / "prose.txt")
    local = [f"calibration.text={text}"] if "\ncalibration:" in written else []
    local += [f"evaluate.perplexity.text={text}"] if "\nevaluate:" in written else []
    try:
        plan = make_plan(load(recipe, overrides=local), Store(place / "store"), weights=False, digests=False)
    except RecipeError as error:
        if {problem.code for problem in error.problems} != {"library-missing"}:
            raise
        return  # all that is missing is the runtime that the result would be measured with
    assert not [warning for warning in plan.warnings if warning.level != "warning"]
    one = presets.rows()[name]
    assert plan.facts.model_type in one.models
    assert one.billions[0] <= plan.facts.parameters / 1e9 <= one.billions[1]
    assert one in presets.matching(str(model))
    assert one in presets.matching(one.target)


def test_recipes_and_figures_are_what_the_command_writes() -> None:
    recorded = tomllib.loads(script.RECORDED.read_text(encoding="utf-8"))
    assert recorded == {name: script.figures(one) for name, one in presets.rows().items() if one.record}
    shipped = {each.stem: each.read_text(encoding="utf-8") for each in script.RECIPES.glob("*.yaml")}
    assert shipped == {
        name: presets.recipe(one, Path(f"recipes/presets/{name}.yaml"), model=None, target=None, schema="")
        for name, one in presets.rows().items()
    }


def test_a_record_of_other_options_is_refused() -> None:
    from dataclasses import replace

    one = presets.find("smollm2-cpu-fast")
    for stage in ("quantize: {method: gptq, bits: 8, group_size: 64}", "quantize: {method: awq, bits: 4}"):
        with pytest.raises(SystemExit, match="ran quantize gptq"):
            script.figures(replace(one, stages=(stage, one.stages[1])))


def test_what_is_not_recorded_says_so_and_claims_no_figure() -> None:
    shown = CliRunner().invoke(app, ["presets", "l4"], catch_exceptions=False).stdout
    assert shown.count(f"record: {NOT_RECORDED}") == 2
    assert "tokens/s" not in shown
    told = CliRunner().invoke(app, ["presets", "llama"], catch_exceptions=False).stdout
    assert "commit 4954e9d" in told
    assert max(map(len, told.splitlines())) <= 80
    with pytest.raises(UsageError):
        presets.matching("no such family")
    with pytest.raises(UsageError, match="unknown preset") as error:
        presets.find("smollm2-cpu-fats")
    assert "smollm2-cpu-fast" in error.value.fix


def test_recommend_knows_what_was_recorded(place: Path) -> None:
    from optikit import targets
    from optikit.models.reader import read

    cpu = targets.find("cpu")
    assert cpu is not None
    found = recommend.candidates(read(place / "smollm2", promised=True), cpu)
    known = {one.name: one.quality for one in found if one.quality}
    recorded = known["int8 w8a16 + onnxruntime"]
    assert recorded.ratio == presets.find("smollm2-cpu-exact").recorded["evidence"]["ratio"]
    assert "recorded: examples/smollm2-135m-int8-w8a16-cpu" in recorded.source
