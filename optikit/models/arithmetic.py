"""Values in config.json that a model computes with: of the right kind, finite, and in their range.

A loader takes what it finds: a quoted "false" is true, NaN goes through every layer, and a rotary embedding of an
unknown type ends hours of work. The names on this page are held to transformers' own classes by a test.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optikit.errors import RecipeError

ACTIVATIONS = frozenset(
    {"gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh"}
    | {"gelu_accurate", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2"}
    | {"relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "prelu", "xielu"}
)
"""Functions between two layers of an MLP that transformers knows by name."""
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")
TRUTHS = frozenset(
    {"attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "use_bidirectional_attention"}
    | {"attention_out_bias", "use_bias", "use_qkv_bias", "no_bias", "bias", "alibi", "use_qk_norm", "qk_layernorm"}
    | {"do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm"}
    | {"scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"}
    | {"use_parallel_residual", "parallel_attn", "apply_residual_connection_post_layernorm"}
    | {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"}
    | {"lm_head_bias", "norm_topk_prob", "qkv_bias", "rope_interleave", "attn_temperature_tuning"}
)
"""Keys that are true or false."""
ROPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "longrope": ("short_factor", "long_factor"),
        "su": ("short_factor", "long_factor"),
        "proportional": (),
    }
)
"""Types of rotary embeddings, and what each can't be computed without; `su` is what longrope was called first."""
_ROPE_NUMBERS = frozenset(
    {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    | {"attention_factor", "beta_fast", "beta_slow", "partial_rotary_factor", "mscale", "mscale_all_dim"}
)
_ROPE_LISTS = ("short_factor", "long_factor")
_ROPE_KEYS = ("rope_parameters", "rope_scaling")
POSITIVE = re.compile(
    r"^(rope_theta|rope_local_base_freq|query_pre_attn_scalar|partial_rotary_factor)$|softcap|_eps(ilon)?$"
)
"""Keys whose numbers are above zero, where they aren't null."""
_SMALL = re.compile(r"_eps(ilon)?$")


def check(settings: Mapping[str, Any], where: Path, *, layers: int, width: int) -> None:
    """Refuse values that nothing can be computed with.

    Args:
        settings: config.json.
        where: The file, for messages.
        layers: Blocks of the model.
        width: Channels of an attention head.

    Raises:
        RecipeError: Naming a key and its value.
    """
    wrong = next(_wrong(settings, layers, width), None)
    if wrong is not None:
        key, value, wanted = wrong
        message = f"{where}: {key} is {reprlib.repr(value)}; {wanted} is wanted"
        raise RecipeError(message, fix="the file is damaged: get it again from where the model came from")


def _wrong(settings: Mapping[str, Any], layers: int, width: int) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, what is wanted) for every value that can't be meant."""
    yield from _endless(settings)
    told = {key: value for key, value in settings.items() if value is not None}
    for key, value in told.items():
        wanted = _wanted(key, value, layers)
        if wanted:
            yield key, value, wanted
    for key in _ROPE_KEYS:
        if key in told:
            yield from _wrong_rope(key, told[key], settings, width)


def _wanted(key: str, value: Any, layers: int) -> str:
    """Return what is wanted in the place of a value; "" where it can be meant."""
    if key in TRUTHS:
        return "" if type(value) is bool else "true or false"
    if key in _ACTIVATION_KEYS:
        known = isinstance(value, str) and value in ACTIVATIONS
        return "" if known else "the name of an activation that transformers has"
    if key == "layer_types":
        return "" if isinstance(value, list) and len(value) == layers else f"a list of {layers} kinds of attention"
    return _wanted_number(key, value) if POSITIVE.search(key) else ""


def _wanted_number(key: str, value: Any) -> str:
    if not _is_positive(value):
        return "a number above 0"
    return "a number below 1" if _SMALL.search(key) and value >= 1 else ""


def _endless(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield the keys at any depth whose number isn't finite."""
    waiting: list[tuple[str, Any]] = list(settings.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            yield key, value, "a finite number"
        elif isinstance(value, dict):
            waiting += [(f"{key}.{name}", inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value]


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _wrong_rope(key: str, value: Any, settings: Mapping[str, Any], width: int) -> Iterator[tuple[str, Any, str]]:
    if not isinstance(value, dict):
        yield key, value, "a mapping"
        return
    kinds = settings.get("layer_types")
    nested = {name: part for name, part in value.items() if isinstance(kinds, list) and name in kinds}
    for name, part in nested.items():  # one for each kind of attention
        if part is not None and not isinstance(part, dict):
            yield f"{key}.{name}", part, "a mapping"
    parts = {f"{key}.{name}": part for name, part in nested.items() if isinstance(part, dict)} or {key: value}
    for name, part in parts.items():
        yield from _wrong_part(name, part, settings, width)


def _wrong_part(
    where: str, part: Mapping[str, Any], settings: Mapping[str, Any], width: int
) -> Iterator[tuple[str, Any, str]]:
    kind = part.get("rope_type", part.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPES:
        yield f"{where}.rope_type", kind, f"one of {', '.join(ROPES)}"
        return
    lacking = [name for name in ROPES[kind] if part.get(name) is None]
    yield from ((f"{where}.{name}", None, f"what rope_type {kind} is computed with") for name in lacking)
    count = _rotated(part, settings, width) // 2
    for name, value in part.items():
        wanted = _wanted_of_rope(name, value, count)
        if wanted:
            yield f"{where}.{name}", value, wanted


def _wanted_of_rope(name: str, value: Any, count: int) -> str:
    """Return what `_wanted` does, of a rotary embedding's part; `count` frequencies have a factor each."""
    if value is None:
        return ""
    if name in _ROPE_NUMBERS:
        return "" if _is_positive(value) else "a number above 0"
    return "" if name not in _ROPE_LISTS or _are_positive(value, count) else f"a list of {count} numbers above 0"


def _rotated(part: Mapping[str, Any], settings: Mapping[str, Any], width: int) -> int:
    """Return the channels of a head that are rotated."""
    share = part.get("partial_rotary_factor") or settings.get("partial_rotary_factor")
    return int(width * share) if share is not None and _is_positive(share) else width


def _are_positive(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_positive, values))
