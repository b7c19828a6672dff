"""What onnxruntime-genai's builder can make a right graph of: families, rotary embeddings, attention windows.

Every stage that lets it build asks here, so that what it can't is refused when planning, whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterator

from optikit.models import architectures, engines
from optikit.models.facts import ModelFacts
from optikit.problems import Problem

BUILDER = "onnxruntime"
"""Its name in rows of families and of engines."""


def problems(facts: ModelFacts) -> Iterator[Problem]:
    """Yield why the builder's graph of a model would be wrong, or only right for short texts."""
    known = architectures.known_to(BUILDER)
    if facts.model_type not in known:
        message = f"onnxruntime-genai's builder doesn't know model_type {facts.model_type!r}"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {', '.join(sorted(known))}")
        return
    yield from engines.unlike(BUILDER, facts)
    right_up_to = window(facts)
    if right_up_to < facts.max_positions:
        message = (
            f"the builder leaves out {facts.model_type}'s attention window: beyond {right_up_to} tokens results differ"
        )
        yield Problem(code="window-left-out", message=message, fix=f"keep to {right_up_to} tokens", level="warning")


def window(facts: ModelFacts) -> int:
    """Return how many tokens a graph of the builder is right for: it may leave an attention window out."""
    family = facts.architecture
    left_out = family is not None and BUILDER in family.windowless
    return facts.sliding_window if left_out and facts.sliding_window else facts.max_positions
