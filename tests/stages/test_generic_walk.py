"""Models without a row in architectures.toml: walked by what their headers and transformers' own class show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from optikit import stages
from optikit.calibration.empty_model import EmptyModel
from optikit.calibration.source_model import SourceModel
from optikit.errors import RecipeError, StageFailedError
from optikit.formats.checkpoint import Checkpoint
from optikit.models import architectures
from optikit.models.facts import TensorFacts
from optikit.models.generic import unsuitable
from optikit.models.reader import read
from optikit.plan import make_plan
from optikit.recipe.load import load
from optikit.stage import Calibration, Job
from optikit.store.store import Store
from tests.conftest import byte_tokenizer
from tests.families import COMMON, GPT
from tests.stages.test_walk_families import logits

UNKNOWN: dict[str, dict[str, Any]] = {
    "apertus": COMMON | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gptj": GPT | {"rotary_dim": 8, "tie_word_embeddings": False},
}
GROUPS = {
    "apertus": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.up_proj",),
        ("mlp.down_proj",),
    ],
    "gptj": [("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)],
}
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "rtn": ("quantize", {"group_size": 32}, 0.4),
    "gptq": ("quantize", {"group_size": 32}, 0.4),
    "int8": ("quantize", {"group_size": 32}, 0.05),
    "wanda": ("prune", {"sparsity": 0.2}, 0.5),
    "magnitude": ("prune", {"sparsity": 0.2}, 0.5),
}


@pytest.fixture(scope="session", params=UNKNOWN)
def unknown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model whose family has no row: treat as read-only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(request.param, **UNKNOWN[request.param])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


def run(source: Path, place: Path, text: Path, method: str) -> dict[str, Any]:
    verb, options, _ = METHODS[method]
    stage = stages.load(verb, method)
    for name in ("model", "scratch"):
        (place / name).mkdir()
    calibration = Calibration(text=text, samples=3, length=40)
    job = Job(source=source, dest=place / "model", scratch=place / "scratch", calibration=calibration)
    found: dict[str, Any] = stage.run(stage.Options(**options), job)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_it_computes_afterwards(unknown: Path, prose: Path, tmp_path: Path, method: str) -> None:
    facts = read(unknown)
    assert architectures.find(facts.model_type) is None
    assert facts.generic is not None
    assert run(unknown, tmp_path, prose, method)["walk"] == "no row: generic walk"
    assert read(tmp_path / "model").linears == facts.linears
    tokens = torch.randint(3, 260, (2, 48), generator=torch.Generator().manual_seed(1))
    before, after = logits(unknown, tokens), logits(tmp_path / "model", tokens)
    assert 0 < float((after - before).norm() / before.norm()) < METHODS[method][2]


def test_linears_are_grouped_as_the_block_calls_them(unknown: Path) -> None:
    source = SourceModel(Checkpoint(unknown))
    model = EmptyModel(source, dtype=torch.float32, device="cpu")
    with torch.no_grad(), model.stem_filled():
        calls = model.record(torch.arange(12)[None])
        hidden = next(model.embedded(torch.arange(12)[None], 1))
        model.fill_block(0)
        assert list(model.traced(0, hidden, calls[0])) == GROUPS[read(unknown).model_type]


def plan(model: Path, folder: Path, prose: Path, stage: dict[str, Any]) -> Any:
    recipe = {"model": str(model), "target": "cpu", "calibration": {"text": str(prose), "samples": 2, "length": 32}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"stages": [stage]}), encoding="utf-8")
    return make_plan(load(folder / "recipe.yaml"), Store(folder / "home"))


def test_the_plan_says_so(unknown: Path, prose: Path, tmp_path: Path) -> None:
    found = plan(unknown, tmp_path, prose, {"quantize": {"method": "gptq", "group_size": 32}})
    assert any("no row" in warning.message and "generic walk" in warning.message for warning in found.warnings)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("quantize", {"method": "awq"}),
        ("quantize", {"method": "int8", "scheme": "w8a8"}),
        ("prune", {"method": "width"}),
        ("prune", {"method": "depth"}),
        ("compile", {"engine": "onnxruntime"}),
    ],
)
def test_what_needs_a_row_is_refused(unknown: Path, prose: Path, tmp_path: Path, verb: str, options: Any) -> None:
    with pytest.raises(RecipeError, match="can't work") as refused:
        plan(unknown, tmp_path, prose, {verb: options})
    assert [problem.code for problem in refused.value.problems] == ["needs-row"]


def edited(source: Path, dest: Path, **changes: Any) -> Path:
    shutil.copytree(source, dest)
    config = json.loads((dest / "config.json").read_text(encoding="utf-8"))
    (dest / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return dest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "ForCausalLM"),
        ({"architectures": ["NeverForCausalLM"]}, "no NeverForCausalLM"),
        ({"model_type": "../llama"}, "transformers has no"),
        ({"is_encoder_decoder": True}, "encoder"),
    ],
)
def test_what_cannot_be_walked_is_refused(unknown: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(edited(unknown, tmp_path / "model", **changes))


def test_a_setting_that_its_class_does_not_read_fails(unknown: Path, prose: Path, tmp_path: Path) -> None:
    strange = edited(unknown, tmp_path / "strange", residual_multiplier=0.5)
    with pytest.raises(StageFailedError, match="residual_multiplier"):
        run(strange, tmp_path, prose, "rtn")


def test_a_linear_that_headers_hide_fails(unknown: Path, prose: Path, tmp_path: Path) -> None:
    """One linear of transformers' class is missing from the checkpoint: a planted fault."""
    from safetensors.torch import load_file, save_file

    lacking = Path(shutil.copytree(unknown, tmp_path / "lacking"))
    tensors = load_file(lacking / "model.safetensors")
    gone = next(name for name in tensors if name.endswith(("down_proj.weight", "fc_out.weight")))
    del tensors[gone]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageFailedError, match=gone.removesuffix(".weight")):
        run(lacking, tmp_path, prose, "rtn")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.block_sparse_moe.input_linear.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.1.feed_forward.router.weight",
        "model.layers.0.moe.gate.weight",
    ],
)
def test_a_mixture_without_a_row_is_no_list_of_linears(name: str) -> None:
    config = {"model_type": "apertus", "architectures": ["ApertusForCausalLM"]}
    assert unsuitable(config, {name: TensorFacts(dtype="BF16", shape=(64, 64))}) == "it is a mixture of experts"
    assert not unsuitable(
        config, {"model.layers.0.shared_mlp.input_linear.weight": TensorFacts(dtype="BF16", shape=(64, 64))}
    )
