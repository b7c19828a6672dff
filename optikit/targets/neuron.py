"""How models lie on Neuron cores: which heads each core gets, what they take there, and in the host while they load.

Sources: awsdocs-neuron, nxd-inference feature guide, "Tensor-parallelism support" (degrees; weights and cache have to
stay below degree × 16 GB, 24 GB on Trainium2); neuronx-distributed-inference modules/attention/gqa.py, which
optimum-neuron shares (padding and replication of heads); aws-neuron-samples, speculative_sampling.ipynb ("we must use
the same tp_degree. Attempting to use a different value for the draft/target model will result in a load failure").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from optikit.models.facts import ModelFacts
from optikit.targets.target import Target

HOST_BYTES_PER_CORE = 1_500_000_000
"""Host memory beside the weights while models are loaded. AWS's text on Llama-2-70B with a 7B draft wants about 200 GB
in bf16 and 360 GB in fp32; 151 and 303 GB of that are weights, which leaves 49 and 57 GB for 32 cores."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Heads after padding and replication, as NxD Inference and optimum-neuron share them out.

    Attributes:
        strategy: `as-they-are`; `replicate-to-tp-degree`: one key-value head per core; `convert-to-mha`: one for every
            query head.
        heads, kv_heads: Query and key-value heads in all, zero heads included.
    """

    strategy: Literal["as-they-are", "replicate-to-tp-degree", "convert-to-mha"]
    heads: int
    kv_heads: int


def sharding(heads: int, kv_heads: int, degree: int) -> Sharding:
    """Return how heads are shared out over a degree: `get_shardable_head_counts` of gqa.py.

    >>> sharding(64, 8, 24)  # one of nine query heads of each group is padding
    Sharding(strategy='replicate-to-tp-degree', heads=72, kv_heads=24)
    >>> sharding(9, 3, 2)
    Sharding(strategy='convert-to-mha', heads=10, kv_heads=10)
    >>> sharding(32, 8, 8).strategy
    'as-they-are'
    """
    padded = -(-heads // degree) * degree
    if heads == kv_heads:
        return Sharding(strategy="as-they-are", heads=padded, kv_heads=padded)
    if kv_heads % degree == 0:
        return Sharding(strategy="as-they-are", heads=padded, kv_heads=kv_heads)
    if degree % kv_heads == 0:
        return Sharding(strategy="replicate-to-tp-degree", heads=padded, kv_heads=degree)
    return Sharding(strategy="convert-to-mha", heads=padded, kv_heads=padded)


@dataclass(frozen=True, kw_only=True)
class Resident:
    """One model on the cores.

    Attributes:
        sharding: Its heads.
        weight_bytes: Its weights there, without what padding and replication add.
        padding_bytes: What those add to the weights.
        cache_bytes: Keys and values of all sequences, for padded and replicated heads, too.
        host_bytes: Its weights in the host while they are loaded.
    """

    sharding: Sharding
    weight_bytes: int
    padding_bytes: int
    cache_bytes: int
    host_bytes: int

    @property
    def bytes(self) -> int:
        """All that it takes on the cores together."""
        return self.weight_bytes + self.padding_bytes + self.cache_bytes


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What is compiled in.

    Attributes:
        dtype: Of weights that aren't quantized, of the arithmetic, and of the cache.
        quantized: Linear layers take one byte per weight.
        batch, length: Sequences at once, and tokens of each.
    """

    dtype: str = "bfloat16"
    quantized: bool = False
    batch: int = 1
    length: int = 4096

    @property
    def element_bytes(self) -> int:
        """Bytes of an element that isn't quantized."""
        return DTYPE_BYTES.get(self.dtype, 2)


def resident(facts: ModelFacts, degree: int, shapes: Shapes) -> Resident:
    """Return what a model takes at a degree.

    A tied embedding is loaded twice, as the libraries clone it for the output layer.
    """
    size, found = shapes.element_bytes, sharding(facts.heads, facts.kv_heads, degree)
    stored = compiled_bytes(facts, shapes)
    added = 2 * (found.heads - facts.heads) + 2 * (found.kv_heads - facts.kv_heads)
    per_token = facts.cached or 2 * found.kv_heads * facts.head_dim
    return Resident(
        sharding=found,
        weight_bytes=stored + (size * facts.vocab * facts.hidden if facts.tied else 0),
        padding_bytes=0 if facts.cached else added * facts.layers * facts.hidden * facts.head_dim * size,
        cache_bytes=facts.layers * per_token * shapes.length * shapes.batch * size,
        host_bytes=stored,
    )


def compiled_bytes(facts: ModelFacts, shapes: Shapes) -> int:
    """Return the size of weights in the dtype that is compiled in; what a quantizer packed stays as it is."""
    if "dense" not in facts.traits:
        return facts.weight_bytes
    if shapes.quantized:
        rest = facts.parameters - facts.linear_elements
        return facts.linear_elements + rest * shapes.element_bytes
    return facts.parameters * shapes.element_bytes


def medusa_bytes(facts: ModelFacts, heads: int, degree: int, shapes: Shapes) -> int:
    """Return what Medusa heads take: an output layer each, shared out, and a residual block on every core."""
    block = facts.hidden**2 + facts.hidden
    return heads * (facts.vocab * facts.hidden + degree * block) * shapes.element_bytes


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Models that run together, all on the same cores.

    Attributes:
        degree: Cores that share them.
        residents: What each takes: the model first, then its draft.
        heads_bytes: What Medusa heads take.
    """

    degree: int
    residents: tuple[Resident, ...]
    heads_bytes: int = 0

    @property
    def need_bytes(self) -> int:
        """Weights and caches of everything that is there at once."""
        return sum(each.bytes for each in self.residents) + self.heads_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory while all of them are loaded."""
        return sum(each.host_bytes for each in self.residents) + self.degree * HOST_BYTES_PER_CORE

    def fits(self, target: Target) -> bool | None:
        """Return whether the cores hold them; None where the target's row doesn't say."""
        if target.core_memory_gb is None:
            return None
        return self.need_bytes < self.degree * target.core_memory_gb * 1e9


def place(degree: int, models: Sequence[ModelFacts], shapes: Shapes, *, medusa_heads: int = 0) -> Placement:
    """Place models on the same cores; Medusa heads are those of the first."""
    heads = medusa_bytes(models[0], medusa_heads, degree, shapes) if medusa_heads else 0
    residents = tuple(resident(facts, degree, shapes) for facts in models)
    return Placement(degree=degree, residents=residents, heads_bytes=heads)


def degrees(target: Target) -> tuple[int, ...]:
    """Return degrees of tensor parallelism to try, the smallest first: the documented ones, else powers of two."""
    return target.tensor_parallel or tuple(2**power for power in range((target.cores or 1).bit_length()))


def widest(target: Target, facts: ModelFacts) -> int:
    """Return the largest degree whose cores a model's heads can be shared out among without padding."""
    return max((degree for degree in degrees(target) if facts.heads % degree == 0), default=1)


def fitting(target: Target, models: Sequence[ModelFacts], shapes: Shapes, *, medusa_heads: int = 0) -> tuple[int, ...]:
    """Return the degrees at which a target holds models that run together."""
    placed = (place(degree, models, shapes, medusa_heads=medusa_heads) for degree in degrees(target))
    return tuple(each.degree for each in placed if each.fits(target) is not False)


def told(
    placement: Placement, target: Target, models: Sequence[ModelFacts], names: Iterable[str], fit: Sequence[int]
) -> list[str]:
    """Return a placement as lines for people.

    Args:
        placement: What lies where.
        target: Whose cores.
        models: What is placed, in the same order.
        names: What to call each.
        fit: The degrees at which it fits.
    """
    lines = [f"on {placement.degree} of {target.cores} cores of {target.name}"]
    for name, facts, each in zip(names, models, placement.residents, strict=True):
        line = f"  {name:8} weights {_gb(each.weight_bytes)} + cache {_gb(each.cache_bytes)}"
        lines.append(line + _padding(facts, each))
    if placement.heads_bytes:
        lines.append(f"  heads    {_gb(placement.heads_bytes)}: an output layer each")
    memory = "" if target.core_memory_gb is None else f" of {placement.degree * target.core_memory_gb:.0f} GB"
    lines.append(f"  cores    {_gb(placement.need_bytes)}{memory}{_at(fit, target)}")
    lines.append(f"  host     about {_gb(placement.host_bytes)}{_host(placement, target)}")
    return lines


def _host(placement: Placement, target: Target) -> str:
    if target.host_memory_gib is None:
        return " while loading"
    memory = target.host_memory_gib * 2**30
    lacking = ": more than there is" if placement.host_bytes >= memory else ""
    return f" of {memory / 1e9:.0f} GB while loading{lacking}"


def _at(fit: Sequence[int], target: Target) -> str:
    if target.core_memory_gb is None:
        return ""
    return f"; fits at tensor_parallel {', '.join(map(str, fit))}" if fit else "; fits at no tensor_parallel here"


def _padding(facts: ModelFacts, each: Resident) -> str:
    """Say what padding and replication cost."""
    found, parts = each.sharding, []
    if found.heads > facts.heads:
        parts.append(f"{facts.heads} heads padded to {found.heads}: {1 - facts.heads / found.heads:.0%} of attention")
    if found.kv_heads > facts.kv_heads and facts.kv_heads != facts.heads:
        times = f"{found.kv_heads / facts.kv_heads:.3g}"
        parts.append(f"{facts.kv_heads} key-value heads become {found.kv_heads}: cache × {times}")
    if not parts:
        return ""
    return f" + {_gb(each.padding_bytes)} ({'; '.join(parts)})"


def _gb(size: int) -> str:
    digits = 2 if size < 10e9 else 1 if size < 100e9 else 0
    return f"{size / 1e9:.{digits}f} GB"
