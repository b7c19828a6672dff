"""Every family with gguf facts: a tiny model, laid out as llama.cpp's converter does it, is read back bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from optikit.formats.gguf_weights import GgufWeights
from optikit.models import architectures, gguf_header
from optikit.models.gguf_reader import read_gguf
from optikit.models.reader import read
from optikit.stage import Job
from optikit.stages.acquire import gguf as stage
from tests import families, mixtures
from tests.models import gguf_files

READ = tuple(name for name, row in architectures.rows().items() if row.gguf)
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"num_hidden_layers": 6, "sliding_window_pattern": 6, "final_logit_softcapping": 20.0},
    "phi3": {"sliding_window": 24},
    "gpt2": {"layer_norm_epsilon": 1e-4},
    "smollm3": {"no_rope_layers": None},
    "starcoder2": {"sliding_window": None, "norm_epsilon": 1e-4},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6},
}
QUANTIZED = [name for name, block, _ in gguf_header.BLOCKS.values() if block > 1 and name != "Q8_K"]


def save(name: str, directory: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    told = families.CONFIGS.get(name) or mixtures.COMMON | mixtures.FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(told | {"vocab_size": 260} | CHANGES.get(name, {}) | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in model.parameters():
        weight.data = weight.data + 0.1 * torch.randn_like(weight) if weight.ndim == 1 else 3 * weight.data
    model.to(dtype).save_pretrained(directory)
    return directory


def acquire(source: Path, dest: Path) -> dict[str, Any]:
    dest.mkdir()
    return stage.run(stage.Options(), Job(source=source, dest=dest, scratch=dest))


def logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.randint(3, 260, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", READ)
def test_every_tensor_and_every_logit_is_the_model_s(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    row = architectures.rows()[name]
    gguf_files.of_directory(source, tmp_path / "tiny.gguf", row.gguf)
    facts = acquire(tmp_path / "tiny.gguf", tmp_path / "model")
    theirs, mine = load_file(source / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert mine.keys() == {key for key in theirs if not key.endswith(".attn.bias")}
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key
        assert tensor.dtype == theirs[key].dtype, key
    assert (facts["dtype"], facts["rounded"], facts["exact"]) == ("bfloat16", 0, len(mine))
    assert torch.equal(logits(source), logits(tmp_path / "model"))
    promised, found = read_gguf(tmp_path / "tiny.gguf"), read(tmp_path / "model")
    for figure in ("linears", "parameters", "experts", "routers", "sliding_window", "tied"):
        assert getattr(promised, figure) == getattr(found, figure), figure


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_other_floats_are_kept(kind: str, tmp_path: Path) -> None:
    dtype = {"F16": torch.float16, "F32": torch.float32}[kind]
    source = save("llama", tmp_path / "source", dtype)
    gguf_files.of_directory(source, tmp_path / "tiny.gguf", "llama", kind)
    facts = acquire(tmp_path / "tiny.gguf", tmp_path / "model")
    theirs, mine = load_file(source / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == dtype for key in theirs)
    assert facts["dtype"] == str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == facts["dtype"]


def test_what_two_bytes_do_not_hold_stays_float32(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source", torch.float32)
    gguf_files.of_directory(source, tmp_path / "tiny.gguf", "llama", "F16")
    facts = acquire(tmp_path / "tiny.gguf", tmp_path / "model")
    theirs, mine = load_file(source / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert facts["rounded"] == 0, "float16 of the file is float16 of the model"
    norms = [key for key in mine if "norm" in key]
    assert all(mine[key].dtype == torch.float32 and torch.equal(mine[key], theirs[key]) for key in norms)
    assert all(mine[key].dtype == torch.float16 for key in mine.keys() - norms)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_blocks_are_what_the_gguf_package_makes_of_them(kind: str, tmp_path: Path) -> None:
    """In float32 as they are read, bit by bit; and rounded once where they are written."""
    wide = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
    source = save("qwen2", tmp_path / "source", **wide)
    held = gguf_files.of_directory(source, tmp_path / "tiny.gguf", "qwen2", kind)
    weights = GgufWeights(tmp_path / "tiny.gguf")
    for name, short in (("mlp.up_proj", "ffn_up"), ("self_attn.k_proj", "attn_k"), ("mlp.down_proj", "ffn_down")):
        found = torch.cat(list(weights.pieces(f"model.layers.0.{name}.weight")))
        np.testing.assert_array_equal(found.numpy(), held[f"blk.0.{short}.weight"])
    facts = acquire(tmp_path / "tiny.gguf", tmp_path / "model")
    mine = load_file(tmp_path / "model" / "model.safetensors")
    for name, short in (("layers.0.mlp.gate_proj", "blk.0.ffn_gate"), ("embed_tokens", "token_embd")):
        theirs = torch.from_numpy(held[f"{short}.weight"].copy()).to(torch.bfloat16)
        assert torch.equal(mine[f"model.{name}.weight"], theirs)
    assert facts["tensor_types"][kind] == 8
    assert facts.get("largest_rounding", 0) < 2**-8


def test_a_piece_at_a_time_is_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save("mixtral", tmp_path / "source")
    gguf_files.of_directory(source, tmp_path / "tiny.gguf", "llama", "Q4_0")
    whole = GgufWeights(tmp_path / "tiny.gguf")
    before = {name: torch.cat([each.reshape(-1) for each in whole.pieces(name)]) for name in whole.shapes}
    monkeypatch.setattr("optikit.formats.gguf_weights.PIECE", 200)
    assert len(list(whole.pieces("model.embed_tokens.weight"))) > 50
    for name, wanted in before.items():
        assert torch.equal(torch.cat([each.reshape(-1) for each in whole.pieces(name)]), wanted)


def test_long_contexts_of_phi3(tmp_path: Path) -> None:
    factors = {"long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.5], "short_factor": [1.0] * 7 + [1.25]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    source = save("phi3", tmp_path / "source", rope_parameters=rope, original_max_position_embeddings=64)
    tables = {f"rope_factors_{name[:-7]}.weight": np.asarray(values, "f4") for name, values in factors.items()}
    gguf_files.of_directory(
        source, tmp_path / "tiny.gguf", "phi3", tables=tables, rope__scaling__original_context_length=64
    )
    acquire(tmp_path / "tiny.gguf", tmp_path / "model")
    assert torch.equal(logits(source), logits(tmp_path / "model"))
    for name, values in factors.items():
        assert json.loads((tmp_path / "model" / "config.json").read_text())["rope_parameters"][name] == values
