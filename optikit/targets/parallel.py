"""How a server shares a model out over accelerators: which degrees it takes, and what each accelerator then holds."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from optikit.models.facts import ModelFacts


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """A server's row of parallel.toml: see there."""

    kv_heads: Literal["replicate", "divide"]
    pipeline: bool
    source: str

    def takes(self, facts: ModelFacts, tensor: int) -> bool:
        """Return whether the heads and the MLP of a model can be shared out over so many accelerators."""
        if facts.heads % tensor or facts.intermediate % tensor:
            return False
        if facts.kv_heads % tensor == 0 or facts.cached:  # latent attention has one cache, copied to each
            return True
        return self.kv_heads == "replicate" and tensor % facts.kv_heads == 0

    def degrees(self, facts: ModelFacts, accelerators: int) -> Iterator[tuple[int, int]]:
        """Yield (tensor, pipeline) parallel degrees that fit on so many accelerators, the fewest first."""
        for tensor in range(1, accelerators + 1):
            if self.takes(facts, tensor):
                deepest = min(accelerators // tensor, facts.layers) if self.pipeline else 1
                yield from ((tensor, pipeline) for pipeline in range(1, deepest + 1) if _is_power(pipeline))


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0


@cache
def rows() -> Mapping[str, Sharing]:
    """Return how each server shares models out, by its name in rules."""
    text = resources.files("optikit.targets").joinpath("parallel.toml").read_text(encoding="utf-8")
    return {name: Sharing(**row) for name, row in tomllib.loads(text).items()}


def widest(server: str, facts: ModelFacts, accelerators: int) -> int:
    """Return the largest tensor-parallel degree that a server takes of so many accelerators; 1 where no row says.

    It is what a server's folder names, and what rules judge, where a recipe names none.
    """
    row = rows().get(server)
    degrees = range(1, accelerators + 1) if row else ()
    return max((degree for degree in degrees if row and row.takes(facts, degree)), default=1)


def cache_copies(facts: ModelFacts, tensor: int) -> int:
    """Return how many times the whole key-value cache lies on `tensor` accelerators together.

    Key-value heads that there are too few of are copied; the latent cache of MLA has no heads, and each has all of it.
    """
    if facts.cached:
        return tensor
    return -(-tensor // facts.kv_heads) if tensor > facts.kv_heads else 1
