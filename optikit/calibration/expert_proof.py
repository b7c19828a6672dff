"""What the files say of every routed expert that was quantized, in a line for each block.

An expert that came out wrong hides among hundreds: a text seldom needs it. So each is looked at on its own: how many
of the codes it uses, how far its scales reach, and how far its weights are from what they should be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_EXPERT = re.compile(r"(.*?\.\d+)\..*experts\.(\d+)\.")


@dataclass
class Tally:
    """What codes and scales of a linear are, added up a strip of outputs at a time."""

    _counts: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    _scales: list[float] = field(default_factory=list)

    def add(self, codes: Tensor, scales: Tensor) -> None:
        """Take in a strip.

        Args:
            codes: uint8, any shape.
            scales: Any shape.
        """
        self._counts += torch.bincount(codes.reshape(-1), minlength=256)
        self._scales = [float(each) for each in torch.aminmax(scales.abs().float())] + self._scales
        self._scales = [min(self._scales), max(self._scales)]

    @property
    def only(self) -> int | None:
        """The code that all weights have; None where there are more, or none."""
        used = self._counts.nonzero()
        return int(used) if len(used) == 1 else None

    @property
    def entropy(self) -> float | None:
        """Bits that a code carries, by how often each occurs; None without codes."""
        total = int(self._counts.sum())
        shares = self._counts[self._counts > 0].double() / max(total, 1)
        return max(0.0, -float((shares * shares.log2()).sum())) if total else None

    @property
    def scales(self) -> tuple[float, float] | None:
        """The smallest and the largest magnitude of a scale; None without any."""
        return (self._scales[0], self._scales[1]) if self._scales else None


@dataclass(frozen=True)
class Found:
    """What was found of one linear: relative error, and for codes their entropy in bits and the range of scales."""

    name: str
    error: float
    entropy: float | None = None
    scales: tuple[float, float] | None = None


@dataclass
class ExpertProof:
    """Collects what is found of experts, block by block."""

    _blocks: dict[str, dict[str, list[Found]]] = field(default_factory=dict)

    def add(self, found: Found) -> None:
        """Take in a linear, if it is an expert's."""
        if named := _EXPERT.match(found.name):
            self._blocks.setdefault(named[1], {}).setdefault(named[2], []).append(found)

    def facts(self) -> dict[str, Any]:
        """Return a row for each block, with its worst linears by name; nothing where there are no experts."""
        rows = [dict(_row(block, experts)) for block, experts in self._blocks.items()]
        return {"experts": rows} if rows else {}


def _row(block: str, experts: Mapping[str, list[Found]]) -> Iterator[tuple[str, Any]]:
    found = [each for linears in experts.values() for each in linears]
    yield "block", block
    yield "experts", len(experts)
    worst = max(found, key=lambda each: each.error)
    yield "relative_weight_error_most", {"linear": worst.name, "value": round(worst.error, 5)}
    coded = [(each.entropy, each.name) for each in found if each.entropy is not None]
    if coded:
        least = min(coded)
        yield "code_entropy_bits_least", {"linear": least[1], "value": round(least[0], 3)}
    ranges = [each.scales for each in found if each.scales is not None]
    if ranges:
        yield "scale_range", [min(low for low, _ in ranges), max(high for _, high in ranges)]
