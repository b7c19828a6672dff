"""What the metadata of a gguf file says of the model's arithmetic, as config.json would: every key is used, or refused.

Keys below the architecture's name are those of llama.cpp (gguf-py, constants.py). A key that nobody here understands
may change what is computed, so the file is refused and the key is named.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optikit.errors import RecipeError
from optikit.models.gguf_header import GgufHeader, read_values

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with what each rotary frequency is divided by: how Llama 3.1 and later scale."""
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
_PLAIN = frozenset({*FIGURES.values(), "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.finetuned"})
"""Keys that are used as they stand, or change nothing."""
_SAME = {"attention.value_length": "head_dim", "rope.dimension_count": "head_dim", "vocab_size": "vocab"}
"""Keys that have to agree with a figure."""
_SCALING = {
    "linear": frozenset({"factor"}),
    "yarn": frozenset({"factor", "original_context_length", "attn_factor", "yarn_beta_fast", "yarn_beta_slow"}),
    "none": frozenset({"original_context_length"}),
}
"""Types of rope scaling, and the keys below `rope.scaling` that each has."""
_NEUTRAL: Mapping[str, Any] = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "logit_scale": 1.0}
"""Keys that change nothing at one value."""
_LLAMA3_CONTEXTS = tuple(2**power for power in range(6, 18))
"""Contexts that a model may have been trained with before it was scaled; Llama 3.1 to 3.3: 8192."""
_LOW, _HIGH = 1.0, 4.0
"""low_freq_factor and high_freq_factor of every Llama 3."""
_CLOSE = 1e-4


def rope(path: Path, header: GgufHeader, figures: Mapping[str, int]) -> dict[str, Any]:
    """Return `rope_parameters` of config.json, and refuse every key of the architecture that isn't understood.

    Args:
        path: The file.
        header: Its header.
        figures: Of the model, with `vocab` and `head_dim`.

    Raises:
        RecipeError: Naming a key or tensor, and its value.
    """
    family = header.metadata["general.architecture"]
    keys = _below(f"{family}.", header.metadata)
    scaling = _below("rope.scaling.", keys)
    kind = scaling.pop("type", "none")
    known = _SCALING.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise _unknown(path, f"{family}.rope.scaling.type", kind)
    used = _PLAIN | {"rope.scaling.type", *(f"rope.scaling.{name}" for name in known)}
    for key, value in keys.items():
        if key not in used and not _changes_nothing(key, value, figures):
            raise _unknown(path, f"{family}.{key}", value)
    theta = {"rope_theta": float(keys.get("rope.freq_base", 10000.0))}
    if ROPE_FACTORS not in header.tensors:
        return theta | _scaled(path, kind, scaling | {"family": family}, figures)
    if kind != "none":
        raise _unknown(path, ROPE_FACTORS, f"a second scaling beside {kind}")
    return theta | _llama3(path, header, theta["rope_theta"], figures["head_dim"])


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


def _llama3(path: Path, header: GgufHeader, theta: float, width: int) -> dict[str, Any]:
    """Return the llama3 scaling that a table of factors was computed from.

    Raises:
        RecipeError: No such scaling makes this table.
    """
    tensor = header.tensors[ROPE_FACTORS]
    told: Sequence[float] = ()
    if tensor.type == "F32" and tensor.shape == (width // 2,):
        told = struct.unpack(f"<{width // 2}f", read_values(path, header, ROPE_FACTORS))
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
    raise _unknown(path, ROPE_FACTORS, f"a table of {tensor.type} {tensor.shape}, which no llama3 scaling makes")


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
