"""A tiny configuration for every row of architectures.toml, and random models of it by transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
TOKENS = {key: COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
GPT = TOKENS | {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
FALCON = TOKENS | {"hidden_size": 64, "ffn_hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
WINDOWED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"tie_word_embeddings": False},
    "mistral": COMMON | {"sliding_window": 32},
    "qwen2": COMMON,
    "qwen3": COMMON,
    "gemma2": COMMON | {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": COMMON | {"sliding_window": 16, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "phi3": COMMON | {"sliding_window": None, "original_max_position_embeddings": 256},
    "gpt2": GPT,
    "opt": TOKENS
    | {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64}
    | {"max_position_embeddings": 256},
    "granite": COMMON
    | {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.1, "logits_scaling": 8.0},
    "arcee": COMMON,
    "nemotron": COMMON | PARTIAL,
    "seed_oss": COMMON | {"attention_out_bias": True},
    "smollm3": COMMON | {"no_rope_layers": [1, 0]},
    "ministral": COMMON | WINDOWED,
    "ministral3": COMMON
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "helium": COMMON,
    "ernie4_5": COMMON | {"use_bias": True},
    "hunyuan_v1_dense": COMMON,
    "gemma": COMMON,
    "olmo": COMMON,
    "olmo-clipped": COMMON | {"clip_qkv": 0.5},
    "olmo2": COMMON,
    "olmo3": COMMON | WINDOWED,
    "exaone4": COMMON | WINDOWED,
    "cohere": COMMON | {"use_qk_norm": True, "logit_scale": 0.25},
    "cohere2": COMMON | WINDOWED,
    "glm": COMMON,
    "glm4": COMMON,
    "starcoder2": COMMON | {"sliding_window": 16},
    "stablelm": COMMON,
    "stablelm-parallel": COMMON | {"use_parallel_residual": True, "use_qkv_bias": True},
    "phi": COMMON | {"qk_layernorm": True},
    "gpt_neox": COMMON,
    "gpt_bigcode": GPT,
    "gpt_bigcode-multi_head": GPT | {"multi_query": False},
    "falcon": FALCON,
    "falcon-11b": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "falcon-40b": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "falcon-rw": FALCON | {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
    "bloom": TOKENS | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": TOKENS | {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "qwen3_5_text": COMMON
    | {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    | {"linear_num_key_heads": 4, "linear_num_value_heads": 8},
}


def config_of(name: str, **changes: Any) -> Any:
    """Return transformers' configuration of the tiny model of a row."""
    from transformers import AutoConfig

    from optikit.models import architectures

    return AutoConfig.for_model(architectures.rows()[name].model_type, **(CONFIGS[name] | changes))


def model_of(name: str, **changes: Any) -> Any:
    """Return the tiny model of a row in float32, seeded, its norms and biases far from ones and zeros."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, **changes), dtype=torch.float32).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "ln_" in parameter_name or parameter_name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def save(name: str, directory: Path, **changes: Any) -> Path:
    """Write the tiny model of a row as a directory in bf16, with a byte tokenizer."""
    import torch

    from tests.conftest import byte_tokenizer

    model_of(name, **changes).to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer(directory)
    return directory
