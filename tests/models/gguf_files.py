"""Small gguf files, written with the gguf package: an independent writer to judge our reader by."""

from __future__ import annotations

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
    writer.add_block_count(LAYERS)
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
