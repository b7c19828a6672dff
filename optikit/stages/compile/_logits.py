"""The text on which a compiled model is compared with the one that it was made of, and how far logits are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from optikit.models.facts import ModelFacts

TOKENS = 256
"""Tokens of the text."""
FIX = "use another engine for this model, or serve its directory itself"


def probe(facts: ModelFacts, window: int) -> Tensor:
    """Return the text, (tokens,) int64: seeded, and no longer than a graph claims to be right for."""
    import torch

    return torch.randint(facts.vocab, (min(TOKENS, window),), generator=torch.Generator().manual_seed(0))


def relative_distance(found: Tensor, wanted: Tensor) -> float:
    """Return how far logits (tokens, vocabulary) are apart, relative to their spread around each row's mean."""
    spread = (wanted - wanted.mean(dim=-1, keepdim=True)).double().norm()
    return float((found - wanted).double().norm() / spread.clamp_min(1e-30))


def short(value: float) -> float:
    """Return a distance as reports show it."""
    return float(f"{value:.2g}")
