"""A LoRA adapter on its base becomes the model that peft merges, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from optikit.errors import InputMissingError, IntegrityError, OptikitError, RecipeError
from optikit.formats import AsFloats, loadable
from optikit.models import adapter
from optikit.models.reader import read
from optikit.plan import Plan, make_plan
from optikit.recipe.load import load
from optikit.stage import Inputs, Job
from optikit.stages.acquire import adapter as stage
from optikit.store.sources import require_unchanged
from optikit.store.store import Store
from tests.formats.packings import write

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 12, "target_modules": LINEARS},
    "rslora": {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": LINEARS},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LINEARS,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
        "alpha_pattern": {"v_proj": 5},
    },
    "saved whole": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


def train(base: Path, dest: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with random matrices; return the state dict that peft merges, from a fresh load."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in peft.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
    peft.save_pretrained(dest, save_embedding_layers=False)
    told = json.loads((dest / "adapter_config.json").read_text())
    (dest / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": str(base)}))
    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(again, dest).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def merge(source: Path, base: Path, dest: Path) -> dict[str, Any]:
    dest.mkdir()
    inputs = Inputs({"base": base}, ["base"])
    return stage.run(stage.Options(), Job(source=source, dest=dest, scratch=dest, inputs=inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_merges_the_same_weights(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    wanted = train(tiny_llama, tmp_path / "adapter", **KINDS[kind])
    planned = stage.after(stage.Options(), adapter.facts(tmp_path / "adapter", tiny_llama))
    facts = merge(tmp_path / "adapter", tiny_llama, tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    changed = 0
    for name, tensor in load_file(tiny_llama / "model.safetensors").items():
        assert torch.equal(found[name], wanted[name]), name
        changed += not torch.equal(found[name], tensor)
    assert changed == facts["merged"] + facts["replaced"] > 0
    loadable.require(tmp_path / "model")
    after = read(tmp_path / "model")
    assert (planned.traits, planned.linears, planned.dtype) == (after.traits, after.linears, after.dtype)


def test_an_embedding_is_merged_where_the_head_is_another_matrix(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(base / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    save_file(tensors | head, base / "model.safetensors", {"format": "pt"})
    how = {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "o_proj"]}
    wanted = train(base, tmp_path / "adapter", **how)
    merge(tmp_path / "adapter", base, tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])] == []
    assert not torch.equal(found["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    with pytest.raises(RecipeError, match="which is the head of its base, too"):
        adapter.facts(tmp_path / "adapter", tiny_llama)


def test_weights_that_are_stored_the_other_way_round_are_merged_as_peft_does(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.conftest import byte_tokenizer

    base = tmp_path / "base"
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=2, n_positions=64, n_inner=32)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(base)
    byte_tokenizer(base)
    wanted = train(base, tmp_path / "adapter", r=2, target_modules=["c_fc", "c_attn"], fan_in_fan_out=True)
    merge(tmp_path / "adapter", base, tmp_path / "model")
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(tensor, wanted[name]), name


def test_a_packed_base_is_dequantized_first(tiny_llama: Path, tmp_path: Path) -> None:
    train(tiny_llama, tmp_path / "adapter", **KINDS["lora"])
    write(tiny_llama, tmp_path / "base", "bitsandbytes NF4")
    dense = dict(AsFloats(tmp_path / "base"))
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "model")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    wanted = (dense[f"{name}.weight"].bfloat16().float() + 3 * (b @ a)).bfloat16()
    assert torch.equal(load_file(tmp_path / "model" / "model.safetensors")[f"{name}.weight"], wanted)


@pytest.fixture(scope="module")
def once(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapter")
    train(tiny_llama, place, **KINDS["lora"])
    return place


@pytest.fixture
def trained(once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "adapter"))


def planned(directory: Path, **how: Any) -> Plan:
    recipe = {"model": str(directory / "adapter"), "stages": [{"quantize": {"method": "rtn", "group_size": 32}}]}
    (directory / "r.yaml").write_text(yaml.safe_dump(recipe))
    return make_plan(load(directory / "r.yaml"), Store(directory / "home"), **how)


def test_a_plan_names_adapter_and_base_and_sees_when_either_changes(
    trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_llama.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    edit(trained, lambda settings: settings.update(base_model_name_or_path="../base"))
    plan = planned(tmp_path)
    assert [step.name for step in plan.steps] == ["0-acquire-adapter", "1-quantize-rtn"]
    assert plan.facts.packing == "LoRA adapter of rank 4 on ../base"
    require_unchanged(plan.model, Store(tmp_path / "home"))
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(IntegrityError):
        require_unchanged(plan.model, Store(tmp_path / "home"))
    assert planned(tmp_path).steps[0].key != plan.steps[0].key
    (base / "model.safetensors").unlink()
    assert planned(tmp_path, weights=False).model.absent
    with pytest.raises(InputMissingError):
        planned(tmp_path)


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    settings = json.loads((directory / "adapter_config.json").read_text())
    change(settings)
    (directory / "adapter_config.json").write_text(json.dumps(settings))


def retensor(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file({name: each.contiguous() for name, each in tensors.items()}, directory / "adapter_model.safetensors")


UP = "base_model.model.model.layers.1.mlp.up_proj"
FAULTS: dict[str, tuple[Callable[[Path], Any], type[OptikitError], str]] = {
    "dora": (lambda path: edit(path, lambda s: s.update(use_dora=True)), RecipeError, "use_dora is True"),
    "biases": (lambda path: edit(path, lambda s: s.update(bias="all")), RecipeError, "bias is 'all'"),
    "pissa": (
        lambda path: edit(path, lambda s: s.update(init_lora_weights="pissa_niter_4")),
        RecipeError,
        "init_lora_weights",
    ),
    "another kind": (lambda path: edit(path, lambda s: s.update(peft_type="IA3")), RecipeError, "peft_type is 'IA3'"),
    "no base": (lambda path: edit(path, lambda s: s.pop("base_model_name_or_path")), RecipeError, "base_model_name"),
    "a base that is gone": (
        lambda path: edit(path, lambda s: s.update(base_model_name_or_path="/nowhere/at/all")),
        InputMissingError,
        "isn't there",
    ),
    "another rank": (lambda path: edit(path, lambda s: s.update(r=8)), IntegrityError, "rank of"),
    "no alpha": (lambda path: edit(path, lambda s: s.update(lora_alpha=0)), RecipeError, "lora_alpha"),
    "half of a product": (
        lambda path: retensor(path, lambda t: t.pop(f"{UP}.lora_B.weight")),
        IntegrityError,
        "no lora_B",
    ),
    "another base: width": (
        lambda path: retensor(path, lambda t: t.update({f"{UP}.lora_A.weight": torch.zeros(4, 96)})),
        IntegrityError,
        r"for another base: .* makes \(128, 96\)",
    ),
    "another base: depth": (
        lambda path: retensor(
            path,
            lambda t: t.update(
                {n.replace("layers.1.", "layers.7."): t[n].clone() for n in list(t) if "layers.1." in n}
            ),
        ),
        IntegrityError,
        "for another base: llama here, whose head is its embedding, has no model.layers.7",
    ),
    "magnitudes": (
        lambda path: retensor(path, lambda t: t.update({f"{UP}.lora_magnitude_vector": torch.ones(128)})),
        RecipeError,
        "lora_magnitude_vector",
    ),
    "a head of its own": (
        lambda path: retensor(path, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(260, 64)})),
        IntegrityError,
        "whose head is its embedding, has no lm_head",
    ),
    "a pickle": (lambda path: (path / "adapter_model.safetensors").unlink(), InputMissingError, "adapter_model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_not_be_merged_is_refused_by_the_plan(fault: str, trained: Path, tmp_path: Path) -> None:
    spoil, error, said = FAULTS[fault]
    spoil(trained)
    with pytest.raises(error, match=said) as caught:
        planned(tmp_path)
    assert caught.value.fix
