"""What kind of attention a model has, what its cache takes, and what an engine computes it with."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from optikit.models.facts import ModelFacts
from optikit.targets.target import Target

KINDS = {
    "MHA": "multi-head: every query head has keys and values of its own",
    "GQA": "grouped-query: several query heads share one key-value head, and the cache is that much smaller",
    "MQA": "multi-query: all query heads share one key-value head, which parallel devices each hold a copy of",
    "MLA": "multi-head latent: a token leaves one compressed vector, which every device holds whole",
}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What an engine on a device computes attention with: a row of attention.toml, see there."""

    kernel: str
    limits: str
    source: str
    least_capability: int | None = None
    elsewhere: Sequence[int] = ()
    widest: int | None = None
    widths: Sequence[int] = ()
    multiple: int = 1

    def lacks(self, facts: ModelFacts, target: Target) -> str:
        """Say why it isn't used for this model there; "" where it is."""
        capability = target.compute_capability
        if self.least_capability is not None and capability is not None and capability < self.least_capability:
            return f"not below compute capability {self.least_capability / 10:.1f}"
        if capability is not None and capability // 10 in self.elsewhere:
            return f"not first on compute capability {capability / 10:.1f}"
        if self.widths and facts.head_dim not in self.widths:
            return f"not for heads of {facts.head_dim} channels"
        if self.widest is not None and (facts.head_dim > self.widest or facts.head_dim % self.multiple):
            return f"not for heads of {facts.head_dim} channels"
        return ""


@cache
def kernels() -> Mapping[str, Kernel]:
    """Return every row by `ENGINE-DEVICE`."""
    text = resources.files("optikit.targets").joinpath("attention.toml").read_text(encoding="utf-8")
    return {name: Kernel(**row) for name, row in tomllib.loads(text).items()}


def kind(facts: ModelFacts) -> str:
    """Return MHA, GQA, MQA or MLA."""
    if facts.cached:
        return "MLA"
    if facts.kv_heads == facts.heads:
        return "MHA"
    return "MQA" if facts.kv_heads == 1 else "GQA"


def told(facts: ModelFacts) -> str:
    """Say in a line what a model's attention is, and what a token leaves in its cache."""
    name = kind(facts)
    heads = f"{facts.heads} heads of {facts.head_dim}"
    if name in {"GQA", "MQA"}:
        heads = (
            f"{facts.heads} query and {facts.kv_heads} key-value head{'s' * (facts.kv_heads > 1)} of {facts.head_dim}"
        )
    window = f", window of {facts.sliding_window} tokens" if facts.sliding_window else ""
    return f"{name}, {heads}, {facts.kv_cache_bytes(1) / 1024:.4g} KiB of 16-bit cache a token{window}"


def used(engine: str, facts: ModelFacts, target: Target) -> str:
    """Say what an engine computes attention with on a target; "" where no row says."""
    row = kernels().get(f"{engine}-{target.device}")
    if row is None or facts.cached:  # latent attention has kernels of its own
        return ""
    lacking = row.lacks(facts, target)
    return f"{row.kernel} ({lacking}: {row.limits})" if lacking else row.kernel


def card() -> Iterator[str]:
    """Yield what `optikit explain attention` prints."""
    yield from (f"{name:4} {what}" for name, what in KINDS.items())
    yield ""
    yield "A window bounds the tokens that a layer looks at."
    for name, row in kernels().items():
        yield ""
        yield f"{name}: {row.kernel}"
        yield f"  limits  {row.limits}"
        yield f"  source  {row.source}"
