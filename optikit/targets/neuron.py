"""Neuron topology: which tensor-parallel degrees a model may use, from memory per core, heads and the hardware.

Sources: awsdocs-neuron, nxd-inference feature guide, "Tensor-parallelism support" (degrees; weights and cache have to
stay below degree × 16 GB, 24 GB on Trainium2); aws-neuron-samples, speculative_sampling.ipynb ("we must use the same
tp_degree. Attempting to use a different value for the draft/target model will result in a load failure").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from optikit.models.facts import ModelFacts
from optikit.targets.estimate import cache_bytes
from optikit.targets.target import Target, rows


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How models lie on Neuron cores.

    Attributes:
        need_bytes: Weights and caches of everything that has to be there at once.
        cores_needed: Least number of cores whose memory exceeds that.
        degrees: Degrees that the hardware allows, that hold it, and that divide the heads.
    """

    need_bytes: int
    cores_needed: int
    degrees: tuple[int, ...]


def cores_needed(need_bytes: int, core_memory_gb: float) -> int:
    """Return the least number of cores whose memory exceeds a need.

    >>> cores_needed(140_000_000_000, 16)
    9
    >>> cores_needed(160_000_000_000, 16)  # has to stay below, not at
    11
    """
    return int(need_bytes // (core_memory_gb * 1e9)) + 1


def place(target: Target, *models: ModelFacts, batch: int = 1, length: int = 4096) -> Placement:
    """Place models that run together, such as a target and its draft: all on the same set of cores.

    Raises:
        ValueError: The target's row lacks cores, memory per core or degrees.
    """
    if target.core_memory_gb is None or not target.tensor_parallel:
        raise ValueError(f"target {target.name!r} documents no core memory or tensor-parallel degrees")
    need = sum(model.weight_bytes + cache_bytes(model, batch=batch, length=length) for model in models)
    least = cores_needed(need, target.core_memory_gb)
    degrees = (d for d in target.tensor_parallel if d >= least and all(model.heads % d == 0 for model in models))
    return Placement(need_bytes=need, cores_needed=least, degrees=tuple(degrees))


def _llama2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, element_bytes: int) -> ModelFacts:
    """Return the facts of a Llama 2, from its published config.json."""
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
        dtype="BF16" if element_bytes == 2 else "F32",
        weight_bytes=0,
        linears=linears,
        traits=frozenset({"dense"}),
    )
    return replace(facts, weight_bytes=element_bytes * facts.parameters)


def llama2_70b(element_bytes: int = 2) -> ModelFacts:
    """Return the facts of Llama-2-70B (meta-llama/Llama-2-70b-hf config.json)."""
    return _llama2(80, 8192, 28672, 64, 8, element_bytes)


def llama2_7b(element_bytes: int = 2) -> ModelFacts:
    """Return the facts of Llama-2-7B (meta-llama/Llama-2-7b-hf config.json)."""
    return _llama2(32, 4096, 11008, 32, 32, element_bytes)


def worked_example(name: str = "trn1.32xlarge") -> str:
    """Return the arithmetic of Llama-2-70B with a Llama-2-7B draft, as AWS's text on speculative sampling has it."""
    target = rows()[name]
    lines = [f"Worked example: Llama-2-70B with draft Llama-2-7B on {name}, batch 1, 4096 tokens"]
    for label, element_bytes in (("bf16", 2), ("fp32", 4)):
        large, small = llama2_70b(element_bytes), llama2_7b(element_bytes)
        lines.append(f"  {label}:")
        for model, size in ((large, "70B"), (small, "7B")):
            alone = place(target, model)
            lines.append(f"    {size}: {_gb(alone.need_bytes)} weights and cache, at least {_cores(alone)}")
        both = place(target, large, small)
        lines.append(f"    both on the same cores: {_gb(both.need_bytes)}, at least {_cores(both)}")
        degrees = " or ".join(map(str, both.degrees)) or "none: it doesn't fit"
        lines.append(f"    allowed here {_list(target.tensor_parallel)} → tensor_parallel {degrees}")
    lines.append(
        "  AWS's text allows more room (more than 10 and more than 2 cores in bf16) and ends at the same degrees."
    )
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / 1e9:.0f} GB"


def _cores(placement: Placement) -> str:
    return f"{placement.cores_needed} core{'' if placement.cores_needed == 1 else 's'}"


def _list(degrees: tuple[int, ...]) -> str:
    return "{" + ", ".join(map(str, degrees)) + "}"
