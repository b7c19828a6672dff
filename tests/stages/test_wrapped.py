"""Language models in wrappers that see: the text part is quantized, everything else comes out bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit import stages, targets
from optikit.errors import IntegrityError
from optikit.formats import census, dense_model, loadable
from optikit.models.reader import read
from optikit.stage import Calibration, Job
from tests.conftest import byte_tokenizer

TEXT = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
SIGHT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
QWEN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 16},
        "vision_config": SIGHT | {"model_type": "siglip_vision_model", "patch_size": 14},
        "mm_tokens_per_image": 4, "image_token_index": 3,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
        "vision_config": SIGHT | {"model_type": "pixtral", "patch_size": 14, "head_dim": 16},
        "image_token_index": 3,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": SIGHT | {"model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 32},
        "image_token_index": 3,
    },
    "idefics3": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": SIGHT | {"model_type": "idefics3_vision", "patch_size": 14},
        "image_token_id": 3,
    },
    "llama4": {
        "text_config": TEXT | {
            "model_type": "llama4_text", "intermediate_size": 32, "intermediate_size_mlp": 96, "num_local_experts": 4,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 16, "no_rope_layers": [1, 0],
        },
        "vision_config": SIGHT | {
            "model_type": "llama4_vision_model", "patch_size": 14, "intermediate_size": 128, "vision_output_dim": 32,
            "projector_input_dim": 32, "projector_output_dim": 32,
        },
        "image_token_index": 3,
    },
    "qwen2_vl": {
        "text_config": TEXT | QWEN,
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
        "image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | QWEN,
        "vision_config": {
            "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
        },
        "image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6,
    },
    "qwen3_vl": {
        "text_config": TEXT | QWEN,
        "vision_config": {
            "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        },
        "image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6,
    },
    "qwen3_vl_moe": {
        "text_config": TEXT | QWEN | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
        "vision_config": {
            "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        },
        "image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6,
    },
    "qwen3_5_moe": {
        "text_config": TEXT | {
            "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        },
        "vision_config": {
            "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64,
            "num_position_embeddings": 16,
        },
        "image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6,
    },
    "qwen3_5": {
        "text_config": TEXT | {
            "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        },
        "vision_config": {
            "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64,
            "num_position_embeddings": 16,
        },
        "image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6,
    },
}  # fmt: skip


def saved(name: str, directory: Path) -> Path:
    """Write a seeded tiny wrapper, in bf16."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **WRAPPERS[name])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def wrapped(tmp_path_factory: pytest.TempPathFactory):
    """Return what makes a saved tiny wrapper, once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = saved(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_language_part_is_the_one_that_the_wrapper_computes_with(name, wrapped):
    from transformers import AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_pretrained(wrapped(name), dtype=torch.float32).eval()
    alone, missing, odd = dense_model.load(wrapped(name), torch.float32)
    assert (missing, odd) == (set(), set())
    tokens = torch.randint(10, 260, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if name == "llama4":  # its own forward wants images, in transformers 5.24
            whole = whole.language_model
        assert torch.allclose(whole(input_ids=tokens).logits, alone.eval()(tokens).logits, atol=1e-4)


@pytest.mark.parametrize(("method", "options"), [("gptq", {"group_size": 32}), ("int8", {"scheme": "w8a8"})])
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_not_the_language_model_is_carried_bit_by_bit(name, method, options, wrapped, prose, tmp_path):
    source, stage = wrapped(name), stages.load("quantize", method)
    facts, chosen = read(source), stage.Options(**options)
    assert facts.carried
    assert list(stage.check(chosen, facts, targets.find("cpu"))) == []
    for each in ("model", "scratch"):
        (tmp_path / each).mkdir()
    text = Calibration(text=prose, samples=3, length=40)
    found = stage.run(
        chosen, Job(source=source, dest=tmp_path / "model", scratch=tmp_path / "scratch", calibration=text)
    )
    assert found["carried"] == facts.carried
    loadable.require(tmp_path / "model")
    census.take(source, tmp_path / "model", stage.CHANGES, found)
    promised, written = stage.after(chosen, facts), read(tmp_path / "model")
    assert (written.linears, written.carried) == (promised.linears, facts.carried)
    before, after = (load_file(each / "model.safetensors") for each in (source, tmp_path / "model"))
    kept = [key for key in before if any(key.startswith(f"{part}.") for part in facts.carried)]
    assert sum(facts.carried.values()) == len(kept) > 0
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert (
        json.loads((source / "config.json").read_text())["text_config"]
        == (json.loads((tmp_path / "model" / "config.json").read_text())["text_config"])
    )
    tokens = torch.randint(10, 260, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        old, new = (
            dense_model.load(each, torch.float32)[0].eval()(tokens).logits for each in (source, tmp_path / "model")
        )
    assert 0 < float((new - old).norm() / old.norm()) < 0.4


def test_a_wrapper_without_its_language_model_is_refused(wrapped, tmp_path):
    source = wrapped("gemma3")
    tensors = load_file(source / "model.safetensors")
    save_file({key: t for key, t in tensors.items() if "language_model" not in key}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(IntegrityError, match="no tensors of the language model in its text_config"):
        read(tmp_path)
    told = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"text_config": {"model_type": "mamba"}}))
    with pytest.raises(Exception, match="model_type 'mamba' isn't known here"):
        read(tmp_path)


def test_a_wrapper_is_neither_trained_nor_taken_apart(wrapped):
    facts = read(wrapped("gemma3"))
    for verb, method in (("prune", "depth"), ("prune", "width"), ("finetune", "full")):
        stage = stages.load(verb, method)
        problems = {problem.code for problem in stage.check(stage.Options(), facts, targets.find("cpu"))}
        assert "wrapped-model" in problems


def test_experts_that_lie_across_as_they_were_published_are_the_same(wrapped, prose, tmp_path):
    source = wrapped("qwen3_vl_moe")
    for name in ("published", "model", "other", "scratch", "other-scratch"):
        (tmp_path / name).mkdir()
    published = tmp_path / "published"
    for path in source.iterdir():
        (published / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    turned = {key: t.transpose(1, 2).contiguous() if ".mlp.experts." in key else t for key, t in tensors.items()}
    assert sum(turned[key].shape != tensors[key].shape for key in tensors) == 4
    save_file(turned, published / "model.safetensors", {"format": "pt"})
    stage, text = stages.load("prune", "wanda"), Calibration(text=prose, samples=3, length=40)
    for each, dest in ((source, "model"), (published, "other")):
        scratch = tmp_path / ("scratch" if dest == "model" else "other-scratch")
        job = Job(source=each, dest=tmp_path / dest, scratch=scratch, calibration=text)
        census.take(each, tmp_path / dest, stage.CHANGES, stage.run(stage.Options(), job))
    one, other = (load_file(tmp_path / dest / "model.safetensors") for dest in ("model", "other"))
    assert all(torch.equal(one[key], t.transpose(1, 2) if ".mlp.experts." in key else t) for key, t in other.items())


@pytest.mark.parametrize("name", ["llama4", "qwen3_5_moe"])
def test_experts_of_a_wrapper_are_pruned_where_they_lie(name, wrapped, tmp_path):
    source, stage = wrapped(name), stages.load("prune", "magnitude")
    (tmp_path / "model").mkdir()
    found = stage.run(stage.Options(), Job(source=source, dest=tmp_path / "model", scratch=tmp_path / "scratch"))
    assert census.take(source, tmp_path / "model", stage.CHANGES, found).changed >= found["linears_pruned"] / 2
    loadable.require(tmp_path / "model")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_wrapper_as_it_was_published_is_the_same_model(name, wrapped, tmp_path):
    """One config.json for all of it, names without a language model, sections of the rotary embedding as a type."""
    source = wrapped(name)
    told, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    inner = told.pop("text_config")
    rope = inner.pop("rope_parameters")
    inner |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    config = {key: value for key, value in inner.items() if key not in ("model_type", "layer_types")} | told
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t
        for key, t in tensors.items()
    }
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    assert any(key.startswith("visual.") for key in old)
    facts = read(tmp_path)
    assert facts.carried == {"visual": sum(key.startswith("visual.") for key in old)}
    tokens = torch.randint(10, 260, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (dense_model.load(each, torch.float32)[0].eval()(tokens).logits for each in (source, tmp_path))
    assert torch.equal(one, other)
    loadable.require(tmp_path)
