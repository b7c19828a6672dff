"""config.json in the words of gguf: figures, norms, rotary embeddings, windows and caps (gguf-py, constants.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optikit.errors import StageFailedError
from optikit.models import engines
from optikit.models.gguf_settings import llama3_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gguf import GGUFWriter

    from optikit.models.facts import ModelFacts

ENGINE = "llama.cpp"
"""Its name in rows of families."""
WHOLE = frozenset({"sliding_window"})
"""Keys of config.json whose values are whole numbers."""


def architecture(facts: ModelFacts) -> str:
    """Return the `general.architecture` of a model's gguf file.

    Raises:
        StageFailedError: None is known.
    """
    row = facts.architecture
    if row is None or not row.gguf_as:
        raise StageFailedError(f"gguf has no words for {facts.model_type}", fix="use another engine for this model")
    return row.gguf_as


def add(writer: GGUFWriter, facts: ModelFacts) -> None:
    """Write what llama.cpp needs to know of a model's arithmetic."""
    writer.add_context_length(facts.max_positions)
    writer.add_embedding_length(facts.hidden)
    writer.add_block_count(facts.layers)
    writer.add_feed_forward_length(facts.intermediate)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_vocab_size(facts.vocab)
    row = facts.architecture
    for key, name in row.gguf_keys.items() if row is not None else ():
        value = facts.sliding_window if key == "sliding_window" else facts.config.get(key)
        if value:
            add = writer.add_uint32 if key in WHOLE else writer.add_float32
            add(f"{writer.arch}.{name}", value)
    if row is None or "rope_parameters" not in row.settings:
        return
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    _rope(writer, facts)


def rope(facts: ModelFacts) -> Mapping[str, Any]:
    """Return the parameters of rotary embeddings, those of global attention where there are two kinds."""
    config = facts.config
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get("full_attention", found)
    theta = found.get("rope_theta", config.get("rope_theta", 10000.0))
    return {**found, "rope_theta": theta, "rope_type": found.get("rope_type", found.get("type", "default"))}


def _rope(writer: GGUFWriter, facts: ModelFacts) -> None:
    told = rope(facts)
    share = told.get("partial_rotary_factor", facts.config.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(int(facts.head_dim * share))
    writer.add_rope_freq_base(float(told["rope_theta"]))
    both = facts.config.get("rope_parameters") or {}
    if "sliding_attention" in both:
        writer.add_rope_freq_base_swa(float(both["sliding_attention"]["rope_theta"]))
    elif facts.config.get("rope_local_base_freq"):
        writer.add_rope_freq_base_swa(float(facts.config["rope_local_base_freq"]))


def tables(facts: ModelFacts) -> dict[str, list[float]]:
    """Return tensors that no checkpoint holds: what each frequency is divided by."""
    told, kind = rope(facts), engines.rope_type(facts.config)
    if kind == "llama3":
        low, high = float(told["low_freq_factor"]), float(told["high_freq_factor"])
        context = int(told["original_max_position_embeddings"])
        factors = llama3_factors(
            float(told["rope_theta"]), facts.head_dim, float(told["factor"]), context, low=low, high=high
        )
        return {"rope_freqs.weight": factors}
    return {}
