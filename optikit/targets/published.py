"""Times on GPUs that others published, for the plan of a step that none was measured for here."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

LINEAR = "scaled by weights"
"""How a figure of one model is carried to another: block by block, all of these methods do the same to every weight."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of published.toml: see there."""

    methods: Sequence[str]
    minutes: float
    parameters: float
    model: str
    device: str
    source: str

    def told(self, parameters: int) -> str:
        """Say what a model of so many parameters would take, and whose figure that is made of."""
        minutes = self.minutes * parameters / self.parameters
        time = f"{minutes:.2g} min" if minutes < 100 else f"{minutes / 60:.2g} h"
        return (
            f"about {time} on one {self.device}: {LINEAR} from {self.minutes:g} min for {self.model} "
            f"({self.source}; published, not measured here)"
        )


@cache
def rows() -> tuple[Published, ...]:
    """Return every figure."""
    text = resources.files("optikit.targets").joinpath("published.toml").read_text(encoding="utf-8")
    return tuple(Published(**row) for row in tomllib.loads(text)["time"])


def find(verb: str, method: str, scheme: str = "") -> Published | None:
    """Return what was published of a stage; None where nothing is known.

    >>> find("quantize", "gptq").minutes
    30
    >>> find("quantize", "int8", "w8a16") is None
    True
    """
    if verb != "quantize":
        return None
    names = {method, f"{method}.{scheme}"}
    return next((row for row in rows() if not names.isdisjoint(row.methods)), None)
