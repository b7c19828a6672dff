"""What the metadata of a gguf file says of the model's arithmetic, as config.json would: every key is used, or refused.

Keys below the architecture's name are those of llama.cpp (gguf-py, constants.py). A key that nobody here understands
may change what is computed, so the file is refused and the key is named.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import RecipeError
from optikit.models.gguf_header import GgufHeader, read_values

if TYPE_CHECKING:
    from optikit.models.architectures import Architecture

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with what each rotary frequency is divided by: how Llama 3.1 and later scale."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors of Phi 3's scaling for long contexts."""
TABLES = frozenset({ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS})
"""Tensors that no checkpoint holds."""
FIGURES: Mapping[str, str] = {
    "hidden": "embedding_length",
    "intermediate": "feed_forward_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_positions": "context_length",
}
"""Figure of `ModelFacts` → key, below the architecture's name."""
EXPERTS: Mapping[str, str] = {
    "count": "expert_count",
    "chosen": "expert_used_count",
    "width": "expert_feed_forward_length",
}
"""What a row of a mixture calls a key of config.json → key."""
_PLAIN = frozenset({*FIGURES.values(), "rope.freq_base", "rope.scaling.finetuned", "rope.dimension_count"})
"""Keys that are used as they stand, or change nothing."""
_SAME = {"attention.value_length": "head_dim", "vocab_size": "vocab"}
"""Keys that have to agree with a figure."""
_SCALING = {
    "linear": frozenset({"factor"}),
    "yarn": frozenset({"factor", "original_context_length", "attn_factor", "yarn_beta_fast", "yarn_beta_slow"}),
    "none": frozenset({"original_context_length"}),
    "longrope": frozenset({"original_context_length", "attn_factor"}),
}
"""Types of rope scaling, and the keys below `rope.scaling` that each has; `longrope` is told by its tensors."""
_NEUTRAL: Mapping[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "logit_scale": 1.0,
    "expert_gating_func": 1,
    "expert_weights_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
}
"""Keys that change nothing at one value; of gating functions 1 is softmax."""
_LLAMA3_CONTEXTS = tuple(2**power for power in range(6, 18))
"""Contexts that a model may have been trained with before it was scaled; Llama 3.1 to 3.3: 8192."""
_LOW, _HIGH = 1.0, 4.0
"""low_freq_factor and high_freq_factor of every Llama 3."""
_CLOSE = 1e-4
LOCAL = "rope_local_base_freq"
"""Key of config.json of a family whose local attention turns at another speed."""
LOCAL_THETA = 10000.0
_TWENTY_SEVEN = frozenset({("gemma2", 46), ("gemma3", 62)})
"""Architecture and blocks of the models that divide queries by the root of hidden size over heads."""


def settings(path: Path, header: GgufHeader, row: Architecture, figures: Mapping[str, int]) -> dict[str, Any]:
    """Return what config.json says of a model's arithmetic, and refuse every key that isn't understood.

    Args:
        path: The file.
        header: Its header.
        row: Of its family.
        figures: Of the model, with `vocab` and `head_dim`.

    Raises:
        RecipeError: Naming a key or tensor, and its value.
    """
    family = header.metadata["general.architecture"]
    keys, known = _below(f"{family}.", header.metadata), _known(row)
    turned = "rope_parameters" in row.settings
    told, used = _rope(path, header, row, figures) if turned else ({}, frozenset[str]())
    used |= {*(_PLAIN if turned else FIGURES.values()), *known.values()}
    for key, value in keys.items():
        if key not in used and not _changes_nothing(key, value, figures):
            raise _unknown(path, f"{family}.{key}", value)
    found = {name: _told(keys[key]) for name, key in known.items() if key in keys}
    meant = {name: _meant(value, family, figures) for name, value in row.gguf_means.items()}
    return _windowless(row, meant | found, figures["layers"]) | told


def _known(row: Architecture) -> dict[str, str]:
    """Return keys of config.json → keys of a family's gguf files."""
    experts = {} if row.experts is None else {getattr(row.experts, name): key for name, key in EXPERTS.items()}
    return {**row.gguf_keys, **experts}


def _windowless(row: Architecture, found: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return settings of which those of a family with windows say so where there is none; phi3 writes 0 then."""
    if "sliding_window" not in row.gguf_keys or found.get("sliding_window"):
        return found
    everywhere = {"layer_types": ["full_attention"] * layers} if "layer_types" in row.settings else {}
    return {**found, "sliding_window": None, **everywhere}


def _meant(value: Any, family: str, figures: Mapping[str, int]) -> Any:
    """Return what a row says that a gguf file of its family means, one width worked out."""
    if value != "attention_scalar":
        return value
    if (family, figures["layers"]) in _TWENTY_SEVEN:
        return figures["hidden"] // figures["heads"]
    return figures["head_dim"]


def _told(value: Any) -> Any:
    """Return a value; of a number that was rounded to float32 the shortest that rounds to it."""
    if type(value) is not float or not math.isfinite(value):
        return value
    short = float(f"{value:.7g}")
    return short if struct.pack("<f", short) == struct.pack("<f", value) else value


def _rope(
    path: Path, header: GgufHeader, row: Architecture, figures: Mapping[str, int]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return `rope_parameters` of config.json, and the keys that they were made of."""
    family = header.metadata["general.architecture"]
    keys = _below(f"{family}.", header.metadata)
    scaling = _below("rope.scaling.", keys)
    long = LONG_FACTORS in header.tensors
    kind = scaling.pop("type", "longrope" if long else "none")
    known = _SCALING.get(kind) if isinstance(kind, str) else None
    if known is None or long is not (kind == "longrope"):
        raise _unknown(path, f"{family}.rope.scaling.type", kind)
    used = frozenset({"rope.scaling.type", *(f"rope.scaling.{name}" for name in known)})
    base = {"rope_theta": _told(float(keys.get("rope.freq_base", 10000.0)))}
    base |= _share(path, family, keys, row, figures)
    if ROPE_FACTORS in header.tensors:
        if kind != "none":
            raise _unknown(path, ROPE_FACTORS, f"a second scaling beside {kind}")
        found = base | _llama3(path, header, base["rope_theta"], figures["head_dim"])
    elif long:
        found = base | _longrope(path, header, scaling, figures, base.get("partial_rotary_factor", 1.0))
    else:
        found = base | _scaled(path, kind, scaling | {"family": family}, figures)
    if long:  # Phi 3 has it in both places, and the outer one counts
        context = found["original_max_position_embeddings"]
        return {"rope_parameters": found, "original_max_position_embeddings": context}, used
    if LOCAL not in row.settings:
        return {"rope_parameters": found}, used
    local = {"rope_theta": _told(float(keys.get("rope.freq_base_swa", LOCAL_THETA))), "rope_type": "default"}
    both = {"full_attention": found, "sliding_attention": local}
    return {"rope_parameters": both}, used | {"rope.freq_base_swa"}


def _share(
    path: Path, family: str, keys: Mapping[str, Any], row: Architecture, figures: Mapping[str, int]
) -> dict[str, float]:
    """Return which part of a head's channels is turned, where it isn't all."""
    turned, width = keys.get("rope.dimension_count", figures["head_dim"]), figures["head_dim"]
    if turned == width:
        return {}
    if "partial_rotary_factor" not in row.settings or type(turned) is not int or not 0 < turned < width:
        raise _unknown(path, f"{family}.rope.dimension_count", turned)
    return {"partial_rotary_factor": turned / width}


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _changes_nothing(key: str, value: Any, figures: Mapping[str, int]) -> bool:
    """Tell whether a key has the one value at which it changes nothing, or agrees with a figure of the model."""
    if key in _NEUTRAL and value == _NEUTRAL[key]:
        return True
    return key in _SAME and value == figures[_SAME[key]]


def _unknown(path: Path, key: str, value: Any) -> RecipeError:
    message = f"{path}: {key} is {value!r}, and nothing here knows how to compute with that"
    return RecipeError(message, fix="start from the model's safetensors directory")


def _scaled(path: Path, kind: str, told: Mapping[str, Any], figures: Mapping[str, int]) -> dict[str, Any]:
    """Return the scaling that keys below `rope.scaling` name; llama.cpp's defaults of yarn are transformers', too."""
    if kind == "none":
        return {"rope_type": "default"}
    factor = told.get("factor")
    if not isinstance(factor, float) or not 1 <= factor < math.inf:
        raise _unknown(path, f"{told['family']}.rope.scaling.factor", factor)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    found = {"rope_type": "yarn", "factor": factor}
    found["original_max_position_embeddings"] = told.get("original_context_length", figures["max_positions"])
    found |= {name: told[f"yarn_{name}"] for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in told}
    if told.get("attn_factor", 1.0) != 1.0:  # it multiplies what both compute from the factor
        found["attention_factor"] = told["attn_factor"] * (0.1 * math.log(factor) + 1)
    return found


def _longrope(
    path: Path, header: GgufHeader, told: Mapping[str, Any], figures: Mapping[str, int], share: float
) -> dict[str, Any]:
    """Return the scaling of Phi 3 and later: a factor for each frequency, in short contexts and in long ones."""
    count = int(figures["head_dim"] * share) // 2
    context = told.get("original_context_length")
    if type(context) is not int or not 1 < context <= figures["max_positions"]:
        raise _unknown(path, "rope.scaling.original_context_length", context)
    found: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": context}
    for key, name in (("long_factor", LONG_FACTORS), ("short_factor", SHORT_FACTORS)):
        values = [_told(value) for value in _table(header, name, count)]
        if not values or not all(0 < value < math.inf for value in values):
            raise _unknown(path, name, _described(header, name))
        found[key] = values
    ratio = figures["max_positions"] / context
    usual = math.sqrt(1 + math.log(ratio) / math.log(context)) if ratio > 1 else 1.0
    factor = told.get("attn_factor", usual)
    if abs(factor - usual) > _CLOSE:
        found["attention_factor"] = factor
    return found


def _table(header: GgufHeader, name: str, count: int) -> tuple[float, ...]:
    """Return a small table of float32, or () where it isn't one of so many."""
    tensor = header.tensors.get(name)
    if tensor is None or tensor.type != "F32" or tensor.shape != (count,):
        return ()
    return struct.unpack(f"<{count}f", read_values(header, name))


def _described(header: GgufHeader, name: str) -> str:
    tensor = header.tensors.get(name)
    return "missing" if tensor is None else f"a table of {tensor.type} {tensor.shape}"


def _llama3(path: Path, header: GgufHeader, theta: float, width: int) -> dict[str, Any]:
    """Return the llama3 scaling that a table of factors was computed from.

    Raises:
        RecipeError: No such scaling makes this table.
    """
    told = _table(header, ROPE_FACTORS, width // 2)
    for context in _LLAMA3_CONTEXTS if told else ():
        made = llama3_factors(theta, width, max(told), context)
        if all(abs(a - b) <= _CLOSE * b for a, b in zip(told, made, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": max(told),
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": context,
            }
    raise _unknown(path, ROPE_FACTORS, f"{_described(header, ROPE_FACTORS)}, which no llama3 scaling makes")


def llama3_factors(
    theta: float, width: int, factor: float, context: int, *, low: float = _LOW, high: float = _HIGH
) -> list[float]:
    """Return what llama3 scaling divides each frequency by, as llama.cpp's converter writes it."""
    found = []
    for channel in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (channel / width)
        share = (context / wavelength - low) / (high - low)  # of the frequency that stays as it is
        share = min(1.0, max(0.0, share))
        found.append(1 / ((1 - share) / factor + share))
    return found
