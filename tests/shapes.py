"""Facts of models that are too large to be here, from what their published config.json says."""

from __future__ import annotations

from dataclasses import replace

from optikit.models.facts import ModelFacts


def _llama2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> ModelFacts:
    kv_width = hidden // heads * kv_heads
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (kv_width, hidden),
        "v_proj": (kv_width, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    linears = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}
    facts = ModelFacts(
        model_type="llama",
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab=32000,
        max_positions=4096,
        tied=False,
        dtype="BF16",
        weight_bytes=0,
        linears=linears,
        traits=frozenset({"dense"}),
    )
    return replace(facts, weight_bytes=2 * facts.parameters)


def llama2_70b() -> ModelFacts:
    """Llama-2-70B (meta-llama/Llama-2-70b-hf config.json), in bf16."""
    return _llama2(80, 8192, 28672, 64, 8)


def llama2_7b() -> ModelFacts:
    """Llama-2-7B (meta-llama/Llama-2-7b-hf config.json), in bf16."""
    return _llama2(32, 4096, 11008, 32, 32)
