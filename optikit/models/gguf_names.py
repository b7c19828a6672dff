"""Names and order of tensors in gguf files, for writing and for reading: the table of gguf-py, as far as rows need it.

Source: gguf-py/gguf/tensor_mapping.py and the converters in conversion/ of llama.cpp; a test compares all names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optikit.models.architectures import Architecture

EMBEDDING, NORM, HEAD, POSITIONS = "token_embd", "output_norm", "output", "position_embd"
PAIRED = frozenset({"llama", "arcee", "granite", "smollm3"})
"""Architectures whose queries and keys lie so that rotary embeddings turn neighbouring channels."""
MODULES: Mapping[str, str] = MappingProxyType(
    {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "mlp.gate": "ffn_gate_inp",
        "mlp.experts.gate_proj": "ffn_gate_exps",
        "mlp.experts.up_proj": "ffn_up_exps",
        "mlp.experts.down_proj": "ffn_down_exps",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
        "block_sparse_moe.gate": "ffn_gate_inp",
        "block_sparse_moe.experts.w1": "ffn_gate_exps",
        "block_sparse_moe.experts.w3": "ffn_up_exps",
        "block_sparse_moe.experts.w2": "ffn_down_exps",
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
)
"""Module of a block, experts without their number → its name in a gguf file."""
OTHERS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gemma2": {"post_attention_layernorm": "post_attention_norm"},
        "gemma3": {"post_attention_layernorm": "post_attention_norm"},
        "olmo2": {"post_attention_layernorm": "post_attention_norm"},
        "seed_oss": {"post_attention_layernorm": "post_attention_norm"},
    }
)
"""By architecture, modules that are called otherwise there."""
OUTSIDE: Mapping[str, str] = MappingProxyType({"transformer.wpe": POSITIONS})
"""Modules outside of blocks that no column of a row names."""
_BLOCK = re.compile(r"blk\.(?P<index>0|[1-9]\d{0,5})\.(?P<inside>.+)")
_EXPERT = re.compile(r"(?<=experts)\.\d+(?=\.)")


def of_tensor(architecture: Architecture, gguf: str, tensor: str) -> str | None:
    """Return the name in gguf files of a tensor, or None: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`.

    An expert's is that of the tensor that stacks them all.
    """
    module, _, leaf = tensor.rpartition(".")
    blocks = f"{architecture.blocks}."
    if not module.startswith(blocks):
        outside = {architecture.embedding: EMBEDDING, architecture.norm: NORM, architecture.head: HEAD, **OUTSIDE}
        return f"{outside[module]}.{leaf}" if module in outside else None
    index, _, inside = module.removeprefix(blocks).partition(".")
    inside = _EXPERT.sub("", inside)
    found = OTHERS.get(gguf, {}).get(inside, MODULES.get(inside))
    return f"blk.{index}.{found}.{leaf}" if found else None


def places(architecture: Architecture, stored: Iterable[str], experts: int) -> dict[str, tuple[str, ...]]:
    """Return what tensors of a gguf file are called in a model directory; of those that stack experts every expert's.

    A name is left out where the family has nothing like it.
    """
    patterns = {}
    for pattern, words in architecture.tensors.items():
        first = pattern.replace("*", architecture.block(0), 1).replace("#", "0")
        there = of_tensor(architecture, architecture.gguf, first) if words else None
        if there is not None:
            patterns[there] = pattern
    found = {}
    for name in stored:
        block = _BLOCK.fullmatch(name)
        wanted = patterns.get(f"blk.0.{block['inside']}" if block else name)
        if wanted is not None:
            full = wanted.replace("*", architecture.block(int(block["index"])), 1) if block else wanted
            each = (full.replace("#", str(expert)) for expert in range(experts))
            found[name] = tuple(each) if "#" in full else (full,)
    return found
