"""What a walk changes of one block: groups that are still to be done, and the new tensors of those that are."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from torch import Tensor

from optikit.calibration.method import Group, PreviousOp, Result
from optikit.calibration.resume import AIM, ResumeState
from optikit.calibration.source_model import Linears, SourceModel
from optikit.stage import Job

Change = tuple[Linears, Callable[[], Result]]
"""A group, and the method's `apply` bound to it and to its finished statistic."""


class Block:
    """New tensors of one block; `forward` puts new weights into the module that computes its outputs."""

    def __init__(self, source: SourceModel, forward: Callable[[Linears, tuple[Tensor, ...]], None]) -> None:
        self._source, self._forward = source, forward
        self.tensors: dict[str, Tensor] = {}
        self.linears: list[str] = []
        self.facts: dict[str, Any] = {}

    def take(self, linears: Linears, result: Result) -> None:
        """Take a group in: its packed tensors, or its new weights where a method packs nothing."""
        self._forward(linears, result.weights)
        self.tensors.update(result.tensors or self._dense(linears, result.weights))
        self.tensors.update({f"{AIM}{name}": tensor for name, tensor in result.aims.items()})
        self.linears += [linear.name for linear in linears]
        self.tell(result.facts)

    def tell(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Add facts about linears, by name."""
        for name, found in facts.items():
            self.facts[name] = {**self.facts.get(name, {}), **found}

    def put_aside(self, state: ResumeState) -> None:
        """Keep new tensors on disk, of an expert that is finished."""
        state.stash(self.tensors)
        self.tensors = {}

    def _dense(self, linears: Linears, weights: tuple[Tensor, ...]) -> dict[str, Tensor]:
        pairs = zip(linears, weights, strict=True)
        return {f"{linear.name}.weight": self._source.as_checkpoint(linear, weight) for linear, weight in pairs}


Blocks = Generator[tuple[Block, Iterable[Change]]]
"""Blocks with their groups; before the next block is asked for, all groups of the last must be taken in."""


def group_of(job: Job, source: SourceModel, linears: Linears, previous: PreviousOp | None = None) -> Group:
    """Return linears that share an input as a method is given them: names and weights on the device."""
    weights = tuple(source.weight(linear).to(job.device) for linear in linears)
    return Group(names=tuple(linear.name for linear in linears), weights=weights, previous=previous)
