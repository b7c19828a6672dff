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


def entropy(codes: Tensor) -> float:
    """Return the bits that a code carries, by how often each occurs.

    Args:
        codes: Whole numbers from 0 up, any shape.
    """
    shares = torch.bincount(codes.reshape(-1).long()).double() / max(codes.numel(), 1)
    shares = shares[shares > 0]
    return max(0.0, -float((shares * shares.log2()).sum()))


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
