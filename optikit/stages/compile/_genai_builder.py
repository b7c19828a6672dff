"""What onnxruntime-genai's builder can make a right graph of: families, rotary embeddings, attention windows.

Every stage that lets it build asks here, so that what it can't is refused when planning, whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from optikit.models import architectures, engines
from optikit.models.facts import ModelFacts
from optikit.problems import Problem

BUILDER = "onnxruntime"
"""Its name in rows of families and of engines."""
HEAD_MULTIPLE = 16
"""Widths that operator GroupQueryAttention takes ("head_size shall be a multiple of 16")."""
ORIGINAL = "original_max_position_embeddings"
ORIGINAL_CONTEXTS: Mapping[str, int] = MappingProxyType({"phi3": 4096})
"""Families of which a context that isn't the original one means longrope to the builder, whatever rope_type says
(builder.py, create_model); with the original that transformers fills in."""


def problems(facts: ModelFacts) -> Iterator[Problem]:
    """Yield why the builder's graph of a model would be wrong, or only right for short texts."""
    known = architectures.known_to(BUILDER)
    if facts.model_type not in known:
        message = f"no graph of onnxruntime-genai's builder was proven right for model_type {facts.model_type!r}"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {', '.join(sorted(known))}")
        return
    yield from engines.unlike(BUILDER, facts)
    yield from _taken_for_longrope(facts)
    if facts.head_dim % HEAD_MULTIPLE:
        message = f"attention heads are {facts.head_dim} wide, and onnxruntime takes multiples of {HEAD_MULTIPLE}"
        yield Problem(code="head-width", message=message, fix="serve the model directory itself, or use another engine")
    right_up_to = window(facts)
    if right_up_to < facts.max_positions:
        message = (
            f"the builder leaves out {facts.model_type}'s attention window: beyond {right_up_to} tokens results differ"
        )
        yield Problem(code="window-left-out", message=message, fix=f"keep to {right_up_to} tokens", level="warning")


def _taken_for_longrope(facts: ModelFacts) -> Iterator[Problem]:
    original = facts.config.get(ORIGINAL, ORIGINAL_CONTEXTS.get(facts.model_type))
    if facts.model_type in ORIGINAL_CONTEXTS and original != facts.max_positions:
        message = f"the builder takes a context of {facts.max_positions} for longrope where {ORIGINAL} is {original}"
        fix = f"set {ORIGINAL} to {facts.max_positions} in config.json: without longrope it changes nothing else"
        yield Problem(code="taken-for-longrope", message=message, fix=fix)


def window(facts: ModelFacts) -> int:
    """Return how many tokens a graph of the builder is right for: it may leave an attention window out."""
    family = facts.architecture
    left_out = family is not None and BUILDER in family.windowless
    return facts.sliding_window if left_out and facts.sliding_window else facts.max_positions
