"""A row for a model that has none: blocks and linears as the names and shapes in its headers show them.

Enough for methods that fold nothing into anything: every linear stands alone, and nothing is known to be before it. The
walk holds it to transformers' own model before a weight is changed (`calibration/empty_model.py`), and finds there
which linears see the same input, and in what order.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optikit.models.architectures import USUAL_KEYS, Architecture
from optikit.models.facts import TensorFacts
from optikit.models.traits import Storage

ALIASES: Mapping[str, str] = MappingProxyType(
    {"n_embd": "hidden_size", "n_embed": "hidden_size", "d_model": "hidden_size"}
    | {"n_layer": "num_hidden_layers", "n_layers": "num_hidden_layers", "num_layers": "num_hidden_layers"}
    | {"n_head": "num_attention_heads", "n_heads": "num_attention_heads", "num_heads": "num_attention_heads"}
    | {"n_inner": "intermediate_size", "ffn_dim": "intermediate_size", "d_ff": "intermediate_size"}
    | {"n_positions": "max_position_embeddings", "n_ctx": "max_position_embeddings"}
    | {"max_seq_len": "max_position_embeddings", "max_sequence_length": "max_position_embeddings"}
)
"""What families call the figures of a model besides their usual names."""
_NUMBERED = re.compile(r"(.+?)\.(\d+)\.(.+)")
_LEFT_OVER = ("rotary_emb.inv_freq", "attn.masked_bias")
_NO_LINEAR = re.compile(r"embed|norm|conv|relative|bias_table|(?:^|\.)(wte|wpe)(?:\.|$)")
_ROUTED = re.compile(r"expert|sparse_moe|\.moe\.|\brouter\b")
_MOST_SOURCE = 2**20
HEAD = "lm_head"
"""What most of transformers' classes call the output head."""


def architecture(
    config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], scheme: Storage
) -> tuple[Architecture | None, str]:
    """Return a row made of a checkpoint's headers; or None, and why there can't be one.

    Args:
        config: config.json.
        tensors: All headers of the checkpoint.
        scheme: How its linears are stored.
    """
    why = unsuitable(config, tensors)
    blocks = _blocks(tensors)
    if why or not blocks:
        return None, why or "no tensor belongs to a numbered block"
    linears = dict(_linears(tensors, scheme, blocks))
    inside = list(dict.fromkeys(name.removeprefix(f"{blocks}.").partition(".")[2] for name in linears))
    if len(inside) < 2:
        return None, f"{blocks} holds no linear layers"
    tied = bool(config.get("tie_word_embeddings", f"{HEAD}.weight" not in tensors))
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= _others(tensors, scheme, shapes, tied=tied)
    row = Architecture(
        model_type=str(config.get("model_type")),
        blocks=blocks,
        groups=tuple((name,) for name in inside),
        previous_ops=("",) * len(inside),
        residual_sources=("",) * len(inside),
        head=HEAD,
        keys=MappingProxyType({**USUAL_KEYS}),
        aliases=ALIASES,
        defaults=MappingProxyType({"tie_word_embeddings": tied}),
        settings=tuple(config),
        tensors=MappingProxyType({name: " ".join(map(str, shape)) or "scalar" for name, shape in shapes.items()}),
        leftovers=_LEFT_OVER,
        wide=(inside[-2],),
        generic=True,
        alone=True,
    )
    return row, ""


def _others(
    tensors: Mapping[str, TensorFacts], scheme: Storage, linears: Collection[str], *, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that belong to no linear of a block and that the model reads."""
    parts = (*scheme.suffixes, *scheme.optional, *scheme.zeros)
    packed = {f"{name.removesuffix('.weight')}.{part}" for name in linears for part in parts}
    unread = packed | set(linears) | ({f"{HEAD}.weight"} if tied else set())
    return {name: t.shape for name, t in tensors.items() if name not in unread and not name.endswith(_LEFT_OVER)}


def unsuitable(config: Mapping[str, Any], tensors: Mapping[str, TensorFacts]) -> str:
    """Say why a model without a row can't be walked: what it is, or that transformers lacks its class; or ""."""
    if config.get("is_encoder_decoder"):
        return "it has an encoder"
    if isinstance(config.get("text_config"), dict):
        return "its language part lies in text_config"
    if any(_ROUTED.search(name) for name in tensors):
        return "it is a mixture of experts"
    named = config.get("architectures")
    found = str(named[0]) if isinstance(named, list) and named else ""
    if not found.endswith(("ForCausalLM", "LMHeadModel")):
        return f"architectures names {found or 'nothing'}, and a class ForCausalLM is wanted"
    if found not in _classes(str(config.get("model_type"))):
        return f"the installed transformers has no {found} of that model_type"
    return ""


@cache
def _classes(model_type: str) -> frozenset[str]:
    """Return the names of the classes in transformers' file of a model_type, without importing it."""
    spec = find_spec("transformers")
    name = model_type.replace("-", "_")
    if spec is None or spec.origin is None or not re.fullmatch(r"\w+", name):
        return frozenset()
    for folder in (name, name.removesuffix("_text")):
        file = Path(spec.origin).parent / "models" / folder / f"modeling_{folder}.py"
        if file.is_file():
            return frozenset(re.findall(r"^class (\w+)", file.read_text(encoding="utf-8")[:_MOST_SOURCE], re.MULTILINE))
    return frozenset()


def _blocks(tensors: Mapping[str, TensorFacts]) -> str:
    """Return the numbered list of modules that holds most tensors; it starts at 0 and lacks no number."""
    held: dict[str, set[int]] = defaultdict(set)
    counts: dict[str, int] = defaultdict(int)
    for name in tensors:
        found = _NUMBERED.fullmatch(name)
        if found and "." in found[1]:
            held[found[1]].add(int(found[2]))
            counts[found[1]] += 1
    whole = [name for name, numbers in held.items() if numbers == set(range(len(numbers)))]
    return max(whole, key=counts.__getitem__, default="")


def _linears(tensors: Mapping[str, TensorFacts], scheme: Storage, blocks: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the linears of all blocks with their shapes, (out_features, in_features)."""
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        first = scheme.suffixes[0] if scheme.suffixes else ""
        if not name.startswith(f"{blocks}.") or _NO_LINEAR.search(stem.removeprefix(blocks)):
            continue
        if leaf == first or (leaf == "weight" and not scheme.packs(stem, tensors)):
            shape = scheme.shape(stem, tensors, transposed=False)
            if shape is not None:
                yield stem, shape
