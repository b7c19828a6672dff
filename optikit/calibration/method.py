"""Interfaces between the walk and a weight technique: statistic of inputs, change of weights, file layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from optikit.algorithms.grid import pruned_mask
from optikit.formats.checkpoint import Entry
from optikit.formats.packing import Packing
from optikit.stage import Facts, Job


@dataclass(frozen=True, kw_only=True)
class PreviousOp:
    """The module whose outputs are a group's inputs, channel by channel: a scale can be divided out of it.

    Attributes:
        name: Full name.
        tensors: Its tensors by full name: as the checkpoint has them, or as the walk has just made them.
        linear: It is a linear, whose rows are the channels; else a norm.
        offset: Added to a norm's stored weight before it multiplies.
        ties: (in_features,) int64, for each input of the group the channel that it copies (query heads that share a
            value head); None where they are the same.
    """

    name: str
    tensors: Mapping[str, Tensor]
    linear: bool
    offset: float = 0.0
    ties: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linears of one block that see the same input.

    Attributes:
        names: Full names, without `.weight`.
        weights: Per linear (out_features, in_features), float32, as the source has them.
        previous: The module that can take a scale off the inputs; None where none can, or where it also feeds a linear
            that is ignored.
        scale: (in_features,), what the inputs are divided by already, in a module that more than this group reads; None
            where they aren't.
        corrected: (rows of all linears, in_features): stacked weights moved towards the dense model's outputs; None
            where the method asks for no correction.
    """

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    previous: PreviousOp | None = None
    scale: Tensor | None = None
    corrected: Tensor | None = None

    @property
    def width(self) -> int:
        """Input features."""
        return int(self.weights[0].shape[1])

    @property
    def target(self) -> Tensor:
        """Stacked weights that the new ones have to approximate, (rows of all linears, in_features)."""
        return torch.cat(self.weights) if self.corrected is None else self.corrected

    @property
    def pruned_target(self) -> Tensor:
        """`target` with the zeros of pruned weights kept, (rows of all linears, in_features)."""
        alive = None if self.corrected is None else pruned_mask(torch.cat(self.weights))
        return self.target if alive is None else self.target * alive

    def split(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """Cut rows of all linears into those of each."""
        return torch.split(stacked, [len(weight) for weight in self.weights])


@dataclass(frozen=True, kw_only=True)
class Result:
    """New weights of a group.

    Attributes:
        weights: Per linear (out_features, in_features): what the walk goes on with; bit-equal to what `tensors` mean.
        tensors: Written in place of each linear's `weight`, under full names; changed tensors of the previous op may be
            among them. Empty writes `weights` in the checkpoint's layout and dtype.
        aims: What was rounded, of corrected linears; see aims.py.
        facts: Facts about each linear by its name, as JSON.
    """

    weights: tuple[Tensor, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    aims: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The inputs of a group for one batch of tokens, in the model so far changed and in the dense one.

    Attributes:
        inputs: (tokens, in_features): what the group is given now, in the walk's compute dtype.
        dense_inputs: The same tokens' inputs in the dense model; `inputs` where the dense model isn't run.
        residual_gap: (tokens, out_features): dense minus present residual stream that the group's only linear adds its
            output to; None where its output goes elsewhere.
        held_out: Per window of the batch, whether corrections are tried on it instead of fitted to it; empty is none.
    """

    inputs: Tensor
    dense_inputs: Tensor
    residual_gap: Tensor | None = None
    held_out: tuple[bool, ...] = ()

    def parts(self) -> Iterator[tuple[bool, slice]]:
        """Yield runs of tokens whose windows are held out, or aren't."""
        length = len(self.inputs) // max(len(self.held_out), 1)
        start = 0
        for held_out, windows in groupby(self.held_out or (False,)):
            stop = start + length * len(list(windows))
            yield held_out, slice(start, stop)
            start = stop


class Statistic(Protocol):
    """A statistic of a group's inputs, summed up batch by batch."""

    def update(self, batch: Batch) -> None:
        """Take in one batch."""
        ...

    def merge(self) -> None:
        """Add what the other processes of this walk have seen; see distributed.py."""
        ...


@dataclass(frozen=True, kw_only=True)
class Walked:
    """A finished walk, before anything is written.

    Attributes:
        entries: Every tensor of the new checkpoint and where its bytes lie now: in the source, or in scratch.
        linears: Full names of the linears that were changed.
        ignore: Whether a linear (full name) was left as it is.
        added: Names of tensors that no linear has and the source doesn't: scales of caches.
        aims: What corrected linears were aimed at; see aims.py.
        rows: Facts about each linear by its name, as JSON.
    """

    entries: Mapping[str, Entry]
    linears: tuple[str, ...]
    ignore: Callable[[str], bool]
    added: frozenset[str] = frozenset()
    aims: Mapping[str, Entry] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Layout(Protocol):
    """A way to lay out changed linears in files; write_checkpoint.py has those there are."""

    def write(self, job: Job, walked: Walked) -> Facts:
        """Write `job.dest`, verify the files against what was promised, and return facts about them."""
        ...


S = TypeVar("S", bound=Statistic)


@runtime_checkable
class Method(Protocol[S]):
    """A technique that looks at inputs.

    `apply` depends on its arguments alone: a resumed walk repeats it and must get the same bytes.
    """

    @property
    def layout(self) -> Layout:
        """File layout of the results."""
        ...

    @property
    def correct_damp(self) -> float | None:
        """Damping of the correction towards the dense model's outputs: a fraction of the Gram matrix's mean diagonal.

        With it the dense model runs beside the changed one (twice the forward passes), the statistic is a `PairedGram`,
        and `group.target` is corrected. None is no correction.
        """
        ...

    def statistic(self, group: Group) -> S:
        """Return an empty statistic of the group's inputs."""
        ...

    def apply(self, group: Group, statistic: S) -> Result:
        """Change a group's weights."""
        ...


@runtime_checkable
class JointMethod(Protocol):
    """A technique that scales what several groups read, all of them by one scale."""

    def joint(self, previous: PreviousOp, sample: Tensor, gram: Tensor) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """Return a scale (in,), and the tensors of the previous op that change; None where no scale is better.

        Args:
            previous: What the groups read.
            sample: (n, in) float32: rows of all their weights.
            gram: (in, in) float32, mean of x xᵀ of what it gives.
        """
        ...


class StripLayout(Layout, Protocol):
    """A layout of linears that are changed strip by strip."""

    def packing_for(self, dtype: torch.dtype, *, transposed: bool) -> Packing:
        """Return how a linear is packed whose weight the source has in a dtype, as (in, out) if transposed."""
        ...


Strips = Callable[[], Iterator[Tensor]]
"""Reads the weight of a linear from its first output on, some outputs (rows, in) float32 at a time."""


class DataFreeMethod(Protocol):
    """A technique that looks at weights alone, a strip of one linear's outputs at a time: it takes any size."""

    @property
    def layout(self) -> StripLayout:
        """File layout of the results."""
        ...

    def strips(self, weight: Strips, name: str, /) -> Iterator[Mapping[str, Tensor]]:
        """Yield the new tensors of each strip of a linear (full name) by suffix; it may be read more than once."""
        ...


class RowMethod:
    """What methods have in common that look at each output by itself."""

    def strips(self, weight: Strips, name: str) -> Iterator[Mapping[str, Tensor]]:
        """Yield the packed tensors of each strip."""
        return (self.rows(rows, name) for rows in weight())

    def rows(self, weight: Tensor, name: str, /) -> Mapping[str, Tensor]:
        """Return the packed tensors of some outputs of a linear by suffix, from their weight (rows, in) float32."""
        raise NotImplementedError
