"""Small gguf files, written with the gguf package: an independent writer to judge our reader by."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


def vocabulary() -> list[str]:
    from tokenizers import pre_tokenizers

    return ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc"]


def shapes(vocab: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a llama by their gguf names, in PyTorch's order (out, in)."""
    head = HIDDEN // HEADS
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        found |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * head, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * head, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INTERMEDIATE),
        }
    return found


def write(
    path: Path,
    family: str = "llama",
    *,
    spoil: float | None = None,
    leave_out: str = "",
    intermediate: bool = True,
    blocks: int = LAYERS,
    tensors: Mapping[str, np.ndarray[Any, Any]] = {},
    kinds: Mapping[str, str] = {},
    **metadata: float | str,
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a seeded random model, matrices in Q4_1, and return the weights that the file really holds.

    Args:
        path: Of the file.
        family: `general.architecture`.
        spoil: Becomes a weight of the last norm.
        leave_out: A tensor that isn't written.
        intermediate: Tell the width of the MLP.
        blocks: How many it says that it has.
        tensors: Further ones, in float32, and values of those that are there anyway.
        kinds: Types of tensors that have others.
        metadata: Further keys, with `__` for a dot.
    """
    import gguf

    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("Somebody's Model")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    if intermediate:
        writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_block_count(blocks)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key.replace("__", "."), value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    draw = np.random.default_rng(0)
    held = {}
    for name, shape in shapes(len(tokens)).items():
        if name == leave_out:
            continue
        weight = tensors.get(name, draw.normal(0, 0.05, shape)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        if spoil is not None and name == "output_norm.weight":
            weight[3] = spoil
        packed = gguf.quants.quantize(weight, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        held[name] = gguf.quants.dequantize(packed, kind)
    for name in sorted({*tensors} - {*held}):
        kind = gguf.GGMLQuantizationType[kinds.get(name, "F32")]
        packed = gguf.quants.quantize(tensors[name].astype(np.float32), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        held[name] = gguf.quants.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


PAIRED = ("llama", "mixtral", "arcee", "granite", "smollm3")
"""Families whose queries and keys llama.cpp's converter permutes: LlamaModel and what is made of it."""


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp's converter (conversion/base.py and those of families) writes of a config.json."""
    rope = config.get("rope_parameters") or {}
    rope = {**rope.get("full_attention", rope)}
    head = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    named = {
        "context_length": ("max_position_embeddings", "n_positions"),
        "embedding_length": ("hidden_size", "n_embd"),
        "block_count": ("num_hidden_layers", "n_layer"),
        "feed_forward_length": ("intermediate_size", "n_inner"),
        "attention.head_count": ("num_attention_heads", "n_head"),
        "attention.head_count_kv": ("num_key_value_heads", "n_head"),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
        "attention.layer_norm_epsilon": ("layer_norm_epsilon", "norm_epsilon"),
        "attention.scale": ("attention_multiplier",),
        "embedding_scale": ("embedding_multiplier",),
        "residual_scale": ("residual_multiplier",),
        "logit_scale": ("logits_scaling",),
        "attn_logit_softcapping": ("attn_logit_softcapping",),
        "final_logit_softcapping": ("final_logit_softcapping",),
        "expert_count": ("num_local_experts", "num_experts"),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    }
    found = {key: next((config[n] for n in names if config.get(n) is not None), None) for key, names in named.items()}
    if rope:
        found["rope.freq_base"] = float(rope["rope_theta"])
        found["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
        found |= {"attention.key_length": head, "attention.value_length": head}
    if config["model_type"] in ("gemma2", "gemma3_text", "phi3"):
        found["attention.sliding_window"] = config["sliding_window"] or 0
    if local := (config.get("rope_parameters") or {}).get("sliding_attention"):
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    return {key: value for key, value in found.items() if value is not None}


def of_directory(
    source: Path,
    path: Path,
    gguf_name: str,
    kind: str = "BF16",
    *,
    tables: Mapping[str, Any] = {},
    split: int = 0,
    **more: Any,
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a model directory as llama.cpp's converter does, with gguf-py's own table of names.

    Args:
        source: Model directory.
        path: Of the file.
        gguf_name: `general.architecture`.
        kind: Type of matrices; vectors are F32. What gguf-py can't quantize gets random blocks.
        tables: Further tensors in float32.
        split: Tensors of a part, if it is to be in several.
        more: Further keys below the architecture's name, with `__` for a dot.

    Returns:
        The weights that the file has, under its names, dequantized by the gguf package.
    """
    import gguf
    import torch
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    arch = next(each for each, called in gguf.MODEL_ARCH_NAMES.items() if called == gguf_name)
    names = gguf.get_tensor_name_map(arch, 8)
    stacks: dict[str, list[torch.Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
        if not name.endswith(".attn.bias"):
            merged = re.sub(r"experts\.\d+", "experts", name)
            stacks.setdefault(names.get_name(merged, (".weight", ".bias")), []).append(
                _turned(name, tensors[name], config)
            )
    writer = gguf.GGUFWriter(path, gguf_name, split_max_tensors=split)
    _tokenizer(writer, config["vocab_size"])
    for key, value in {**settings_of(config), **{key.replace("__", "."): value for key, value in more.items()}}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{gguf_name}.{key}", value)
    held = {}
    for name, parts in [*stacks.items(), *((name, [torch.tensor(table)]) for name, table in tables.items())]:
        weight = (torch.stack(parts) if len(parts) > 1 else parts[0]).float().numpy()
        vector = weight.ndim == 1 or name in tables or ".ffn_gate_inp" in name
        quant = gguf.GGMLQuantizationType["F32" if vector else kind]
        packed = _packed(weight, quant)
        writer.add_tensor(name, packed, raw_dtype=quant)
        held[name] = gguf.quants.dequantize(packed, quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _packed(weight: np.ndarray[Any, Any], quant: Any) -> np.ndarray[Any, Any]:
    import gguf

    try:
        return np.asarray(gguf.quants.quantize(weight, quant))
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[quant]
        draw = np.random.default_rng(weight.size)
        shape = (*weight.shape[:-1], weight.shape[-1] // block * size)
        return draw.integers(0, 256, shape, np.uint8) & np.uint8(0xBB)  # no scale is infinite then


def _turned(name: str, tensor: Any, config: Mapping[str, Any]) -> Any:
    """Return a tensor as the converter lays it out."""
    if config["model_type"] in PAIRED and name.split(".")[-2] in ("q_proj", "k_proj"):
        heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
        return (
            tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        )
    if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if config["model_type"] == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.T.contiguous()
    return tensor[0] if name.endswith("shared_expert_gate.weight") else tensor


def _tokenizer(writer: Any, vocab: int) -> None:
    tokens = vocabulary()
    tokens = [*tokens, *(f"[PAD{index}]" for index in range(len(tokens), vocab))][:vocab]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
