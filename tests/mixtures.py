"""A tiny configuration for every family with experts, random models of it, and what their linears lose alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optikit import stages
from optikit.algorithms import gptq
from optikit.algorithms.grid import Grid, dequantize
from optikit.calibration import calibration_set
from optikit.calibration.methods.rounding import relative_loss
from optikit.formats import dense_model, dequantized_state
from optikit.formats.checkpoint import Checkpoint
from optikit.models import architectures
from optikit.stage import Calibration, Job
from tests.conftest import byte_tokenizer

COMMON = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 2, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
SHARED = {"moe_intermediate_size": 32, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4, "attention_bias": True},
    "granitemoe": {"num_local_experts": 4, "residual_multiplier": 0.5},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {
        "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0],
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "qwen3_5_moe_text": {
        "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    },
    "glm4_moe": SHARED | {"head_dim": 16, "use_qk_norm": True},
    "deepseek_v2": SHARED | LATENT | {"q_lora_rank": None},
    "deepseek_v3": SHARED | LATENT | {"n_group": 1, "topk_group": 1},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 32, "head_dim": 16, "sliding_window": 16},
    "llama4_text": {
        "num_local_experts": 4, "intermediate_size": 32, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2,
        "head_dim": 16, "attention_chunk_size": 16, "no_rope_layers": [1, 0], "floor_scale": 4,
    },
}  # fmt: skip
ROUTED = re.compile(r"\.gate\.|router|experts")


def save(name: str, directory: Path) -> Path:
    """Write a seeded tiny model of a family, in bf16, its norms, biases and routers far from ones and zeros."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(COMMON | FAMILIES[name]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        scale = 0.3 if "norm" in key or key.endswith(("bias", "sinks")) else 0.1 if ROUTED.search(key) else 0
        parameter.data += scale * torch.randn_like(parameter)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.add_(torch.randn_like(buffer))
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


class Lost(NamedTuple):
    """Relative loss of a linear of an expert in a walk over all of them, and quantized alone with the same data."""

    linear: str
    walked: float
    alone: float


def losses(name: str, source: Path, prose: Path, work: Path, samples: int = 8) -> Iterator[Lost]:
    """Yield what GPTQ loses of every expert of the first block of mixtral or qwen3_moe.

    Attention is left as it is, so that what experts are given is the dense model's.
    """
    row = architectures.find(name)
    assert row is not None
    assert row.experts is not None
    for place in ("dest", "scratch"):
        (work / place).mkdir(parents=True)
    stage = stages.load("quantize", "gptq")
    text = Calibration(text=prose, samples=samples, length=64)
    job = Job(source=source, dest=work / "dest", scratch=work / "scratch", calibration=text)
    stage.run(stage.Options(group_size=32, correct=False, ignore=("*.self_attn.*",)), job)
    model, *_ = dense_model.load(source, torch.float32)
    given: list[Tensor] = []
    experts = model.model.layers[0].get_submodule(row.experts.module)
    experts.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model(calibration_set.draw(source, prose, samples=samples, length=64, seed=0))
    inputs, state = given[0], dict(dequantized_state(work / "dest"))
    grid, dense = Grid(bits=4, group_size=32, sym=True), Checkpoint(source)
    for expert in range(4):
        gate, up, down = (f"{row.block(0)}.{row.experts.linear(expert, part)}" for part in range(3))
        inner = torch.nn.functional.silu(inputs @ state[f"{gate}.weight"].T) * (inputs @ state[f"{up}.weight"].T)
        for linear, seen in ((gate, inputs), (up, inputs), (down, inner)):
            weight, gram = dense.read(f"{linear}.weight").float(), seen.T @ seen / len(seen)
            alone = relative_loss(weight, dequantize(*gptq.quantize(weight, gram, grid).quantized), gram)
            yield Lost(linear, relative_loss(weight, state[f"{linear}.weight"], gram), alone)
