"""What planning knows of a tiny model."""

from __future__ import annotations

import pytest

from optikit.models.facts import ModelFacts
from optikit.targets import Target


@pytest.fixture
def facts() -> ModelFacts:
    """A model with a context of 512 tokens."""
    return ModelFacts(
        model_type="llama",
        hidden=64,
        intermediate=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=260,
        max_positions=512,
        tied=True,
        dtype="BF16",
        weight_bytes=200_000,
        linears={"model.layers.0.mlp.up_proj": (128, 64)},
        traits=frozenset({"dense"}),
    )


@pytest.fixture
def target() -> Target:
    return Target(name="cpu", device="cpu")
