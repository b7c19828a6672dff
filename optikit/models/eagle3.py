"""An EAGLE-3 drafter's directory: what its config.json and its headers say, in either of the two layouts there are.

    speculators   config.json with `speculators_model_type: eagle3`; the layer is `layers.0`. vLLM reads it.
    EAGLE         the authors' own: a Llama's config.json with a `draft_vocab_size`; the layer is `midlayer`

Both have `fc`, `norm`, `lm_head`, and, where not every token can be drafted, `d2t`: what to add to a row's number to
get its token, and `t2d`: which tokens those are. `embed_tokens` may be missing: then it is the target's.

Sources: vllm-project/speculators models/eagle3, convert/eagle; SafeAILab/EAGLE model/cnets.py; vllm
model_executor/models/llama_eagle3.py, transformers_utils/configs/speculators/algos.py
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optikit.errors import IntegrityError, RecipeError
from optikit.models import arithmetic, config, engines, headers, tokenizer
from optikit.models.facts import ModelFacts
from optikit.models.gguf_settings import llama3_factors

TYPE = "speculators_model_type"
LAYER = "transformer_layer_config"
LAYERS = "eagle_aux_hidden_state_layer_ids"
EMBEDDING, OFFSETS, DRAFTABLE = "embed_tokens.weight", "d2t", "t2d"
OPTIONAL = frozenset({EMBEDDING, OFFSETS, DRAFTABLE})
UNKNOWN = ("norm_before_fc", "fc_norm", "norm_output")
"""Settings of later kinds of EAGLE that compute something else."""
HEAD_WIDTH = 16
"""Attention heads of a drafter are a multiple of it wide: onnxruntime's kernel takes no others."""
ROPES = ("default", "linear", "llama3")
"""Types of rotary embeddings that are computed for drafters."""
_FIX = "name a directory of an EAGLE-3 drafter, as speculators or EAGLE write them"
_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class Drafter:
    """What a drafter is.

    Attributes:
        hidden, intermediate, heads, kv_heads, head_dim: Of its layer.
        target_hidden: Width of the target.
        vocab: Tokens of the target.
        drafted: Tokens that can be drafted.
        layers: Blocks of the target whose inputs are read; () is what `default_layers` says.
        eps: Of its norms.
        rope: `rope_parameters` as transformers has them.
        context: Longest text, in tokens.
        norm_before_residual: The skip connection starts behind the norm of the states.
        ours: The layout is that of speculators.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    target_hidden: int
    vocab: int
    drafted: int
    layers: tuple[int, ...]
    eps: float
    rope: Mapping[str, Any]
    context: int
    norm_before_residual: bool
    ours: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, by its name in the speculators layout."""
        h, kv = self.hidden, self.kv_heads * self.head_dim
        layer = {
            "input_layernorm.weight": (h,),
            "hidden_norm.weight": (h,),
            "self_attn.q_proj.weight": (self.heads * self.head_dim, 2 * h),
            "self_attn.k_proj.weight": (kv, 2 * h),
            "self_attn.v_proj.weight": (kv, 2 * h),
            "self_attn.o_proj.weight": (h, self.heads * self.head_dim),
            "post_attention_layernorm.weight": (h,),
            "mlp.gate_proj.weight": (self.intermediate, h),
            "mlp.up_proj.weight": (self.intermediate, h),
            "mlp.down_proj.weight": (h, self.intermediate),
        }
        found = {f"layers.0.{name}": shape for name, shape in layer.items()}
        found |= {"fc.weight": (h, max(1, len(self.layers) or 3) * self.target_hidden), "norm.weight": (h,)}
        found |= {"lm_head.weight": (self.drafted, h), EMBEDDING: (self.vocab, h)}
        return found | {OFFSETS: (self.drafted,), DRAFTABLE: (self.vocab,)}

    @property
    def parameters(self) -> int:
        """Weights, without the embeddings, which are the target's."""
        left_out = OPTIONAL
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name not in left_out)

    def stored(self, name: str) -> str:
        """Return what a tensor is called in its file."""
        return name if self.ours else name.replace("layers.0.", "midlayer.", 1)

    def frequencies(self) -> list[float]:
        """Return the rotary embedding's frequencies (head_dim / 2,), in radians per position."""
        theta, width = float(self.rope["rope_theta"]), self.head_dim
        found = [theta ** -(channel / width) for channel in range(0, width, 2)]
        kind = self.rope.get("rope_type", "default")
        if kind == "linear":
            return [each / float(self.rope["factor"]) for each in found]
        if kind == "llama3":
            context = int(self.rope["original_max_position_embeddings"])
            edges = {"low": float(self.rope["low_freq_factor"]), "high": float(self.rope["high_freq_factor"])}
            factors = llama3_factors(theta, width, float(self.rope["factor"]), context, **edges)
            return [each / factor for each, factor in zip(found, factors, strict=True)]
        return found


def default_layers(blocks: int) -> tuple[int, ...]:
    """Return the blocks whose inputs are read where nothing else is said: low, middle, high.

    >>> default_layers(30), default_layers(4)
    ((2, 15, 27), (1, 2, 3))
    """
    return (2, blocks // 2, blocks - 3) if blocks >= 7 else tuple(range(max(0, blocks - 3), blocks))


def is_drafter(told: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is one of an EAGLE-3 drafter."""
    return TYPE in told or "draft_vocab_size" in told


def describe(told: Mapping[str, Any], where: Path) -> Drafter:
    """Return the drafter that a config.json describes.

    Raises:
        RecipeError: It isn't one, or one of another kind.
    """
    ours = TYPE in told
    if not is_drafter(told) or (ours and told[TYPE] != "eagle3"):
        what = f"{TYPE} is {told[TYPE]!r}" if ours else "there is no draft_vocab_size"
        raise RecipeError(f"{where} describes no EAGLE-3 drafter: {what}", fix=_FIX)
    layer = told.get(LAYER, {}) if ours else told
    if not isinstance(layer, dict):
        raise RecipeError(f"{where}: {LAYER} isn't an object", fix=_FIX)
    _require_known(told, layer, where)
    sizes = {name: _size(layer, name, where) for name in _NEEDED}
    heads = sizes["num_attention_heads"]
    kv_heads = _size(layer, "num_key_value_heads", where, heads)
    head_dim = _size(layer, "head_dim", where, sizes["hidden_size"] // heads)
    if heads % kv_heads:
        message = f"{where}: {heads} heads and {kv_heads} of keys: one has to divide the other"
        raise RecipeError(message, fix=_FIX)
    if head_dim % HEAD_WIDTH:
        message = f"{where}: attention heads are {head_dim} wide, and this runtime takes multiples of {HEAD_WIDTH}"
        raise RecipeError(message, fix="use a drafter with wider heads")
    arithmetic.check(layer, where, layers=1, width=head_dim)
    return Drafter(
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        target_hidden=_size(told, "target_hidden_size", where, sizes["hidden_size"]),
        vocab=sizes["vocab_size"],
        drafted=_size(told, "draft_vocab_size", where, sizes["vocab_size"]),
        layers=_layers(told, where),
        eps=float(layer.get("rms_norm_eps", 1e-6)),
        rope=_rope(layer, where),
        context=_size(layer, "max_position_embeddings", where, 2048),
        norm_before_residual=bool(told.get("norm_before_residual", False)),
        ours=ours,
    )


def _require_known(told: Mapping[str, Any], layer: Mapping[str, Any], where: Path) -> None:
    """Refuse what computes something else than one Llama layer.

    Raises:
        RecipeError: Naming the setting.
    """
    wanted = {"model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu"}
    wrong = [(key, layer[key], value) for key, value in wanted.items() if layer.get(key, value) != value]
    wrong += [(key, told[key], False) for key in UNKNOWN if told.get(key)]
    wrong += [(key, layer[key], False) for key in ("attention_bias", "mlp_bias") if layer.get(key)]
    if wrong:
        key, value, meant = wrong[0]
        message = f"{where}: {key} is {str(value)[:40]!r}, and this runtime computes {meant!r} only"
        raise RecipeError(message, fix="use a drafter of one Llama layer")


def _size(told: Mapping[str, Any], name: str, where: Path, default: int = 0) -> int:
    value = told.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < config.MOST["vocab"]:
        raise RecipeError(f"{where}: {name} is {str(value)[:40]!r}; a whole number from 1 up is wanted", fix=_FIX)
    return value


def _layers(told: Mapping[str, Any], where: Path) -> tuple[int, ...]:
    inner = told.get("eagle_config")
    found = told.get(LAYERS) or (inner.get(LAYERS) if isinstance(inner, dict) else None) or []
    good = isinstance(found, list) and all(type(each) is int and each >= 0 for each in found)
    if not good or sorted(set(found)) != found:
        message = f"{where}: {LAYERS} is {str(found)[:60]}; numbers of blocks are wanted, ascending"
        raise RecipeError(message, fix=_FIX)
    return tuple(found)


def _rope(layer: Mapping[str, Any], where: Path) -> dict[str, Any]:
    kind = engines.rope_type(layer)
    if kind not in ROPES:
        message = f"{where}: rotary embeddings of type {kind!r} aren't computed for drafters"
        raise RecipeError(message, fix=f"use a drafter with {', '.join(ROPES)} rotary embeddings")
    return rope_of(layer)


def rope_of(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's `rope_parameters` for a drafter: its own where their kind is in `ROPES`, else plain ones."""
    kind = engines.rope_type(layer)
    if kind not in ROPES:
        return {"rope_type": "default", "rope_theta": float(layer.get("rope_theta") or 10000.0)}
    found = dict(layer.get("rope_parameters") or layer.get("rope_scaling") or {})
    found["rope_type"] = kind
    found.setdefault("rope_theta", layer.get("rope_theta") or 10000.0)
    found.pop("type", None)
    return found


def read(directory: Path) -> Drafter:
    """Read a drafter's directory: its settings, the shapes of its tensors, its map of tokens.

    Raises:
        InputMissingError: config.json or the weights are missing.
        IntegrityError: A tensor is missing or has another shape; the map leads out of the vocabulary.
        RecipeError: It is no drafter, or one of another kind.
        RefusedError: config.json would make a loader run code.
    """
    drafter = describe(config.load(directory), directory / "config.json")
    tensors = headers.read_directory(directory)
    for name, shape in drafter.shapes.items():
        _require_shape(drafter, name, shape, tensors, directory)
    tokens(directory, drafter)
    return drafter


def _require_shape(
    drafter: Drafter, name: str, shape: tuple[int, ...], tensors: Mapping[str, Any], directory: Path
) -> None:
    found = tensors.get(drafter.stored(name))
    whole = drafter.drafted == drafter.vocab
    if found is None:
        if name == EMBEDDING and drafter.hidden == drafter.target_hidden:
            return
        if name == DRAFTABLE or (name == OFFSETS and whole):
            return
        raise IntegrityError(f"{directory} lacks tensor {drafter.stored(name)}", fix="fetch or write it again")
    if found.shape != shape:
        message = f"{directory}: {drafter.stored(name)} has shape {found.shape}, config.json means {shape}"
        raise IntegrityError(message, fix="fetch it again, or correct config.json")


def tokens(directory: Path, drafter: Drafter) -> list[int]:
    """Return the token that each row of the output layer stands for.

    Raises:
        IntegrityError: Not one each, ascending, in the vocabulary; or `t2d` says otherwise.
    """
    small = headers.read_values(directory, (OFFSETS, DRAFTABLE), most_bytes=8 * config.MOST["vocab"])
    if OFFSETS not in small:
        return list(range(drafter.vocab))
    offsets = array("q", small[OFFSETS])
    found = [row + offset for row, offset in enumerate(offsets)]
    if len(found) != drafter.drafted:
        raise IntegrityError(f"{directory}: {OFFSETS} isn't int64", fix="write it again")
    outside = next(((row, token) for row, token in enumerate(found) if not 0 <= token < drafter.vocab), None)
    if outside is not None:
        message = f"{directory}: {OFFSETS} leads row {outside[0]} to token {outside[1]}, of {drafter.vocab}"
        raise IntegrityError(message, fix="use the drafter of this vocabulary, or write its map again")
    if len(set(found)) != len(found):
        message = f"{directory}: {OFFSETS} leads two rows to one token"
        raise IntegrityError(message, fix="write its map again")
    if DRAFTABLE in small:
        told = {token for token, can in enumerate(small[DRAFTABLE]) if can}
        if told != set(found):
            message = f"{directory}: {DRAFTABLE} names {len(told)} tokens, {OFFSETS} leads to {len(found)} others"
            raise IntegrityError(message, fix="write its maps again")
    return found


def facts(directory: Path) -> ModelFacts:
    """Return a drafter's directory as facts of a model, for what is decided while planning.

    Raises:
        As `read`.
    """
    drafter = read(directory)
    told = tokenizer.describe(directory)
    tensors = headers.read_directory(directory)
    return ModelFacts(
        model_type="eagle3",
        hidden=drafter.hidden,
        intermediate=drafter.intermediate,
        layers=1,
        heads=drafter.heads,
        kv_heads=drafter.kv_heads,
        head_dim=drafter.head_dim,
        vocab=drafter.vocab,
        max_positions=drafter.context,
        tied=False,
        dtype=tensors["fc.weight"].dtype,
        weight_bytes=sum(each.bytes for each in tensors.values()),
        linears={},
        traits=frozenset(),
        tokenizer_sha256=told.sha256 if told else "",
        config=config.load(directory),
    )
