"""What a weight technique is to the walk: a statistic of a group's inputs, and what it does to that group's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Feeder:
    """The module whose outputs are a group's inputs, channel by channel: it can take a scale off them.

    Attributes:
        name: Full name.
        tensors: Its tensors by full name: as stored, or as the walk has just made them.
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
        weights: Per linear (out_features, in_features), float32.
        feeder: What can take a scale off the inputs; None where nothing can, or where it also feeds a linear that is
            left alone.
    """

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    feeder: Feeder | None = None

    @property
    def width(self) -> int:
        """Input features."""
        return int(self.weights[0].shape[1])


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a technique made of a group.

    Attributes:
        weights: Per linear (out_features, in_features): what the walk goes on with; bit-equal to what `tensors` mean.
        tensors: What is written in place of each linear's `weight`, under full names; tensors of the feeder that
            change may be among them.
        facts: Found out on the way, as JSON, by linear name.
    """

    weights: tuple[Tensor, ...]
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Statistic(Protocol):
    """What is kept of the inputs of a group."""

    def update(self, inputs: Tensor) -> None:
        """Take in (tokens, in_features) inputs, in the walk's compute dtype."""
        ...

    def merge(self) -> None:
        """Take in what the other processes of this walk have seen; see ranks.py."""
        ...


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One batch, as a group sees it in the model so far changed and in the dense one.

    Attributes:
        inputs: (tokens, in_features): what the group is given now.
        dense_inputs: The same tokens' inputs in the dense model.
        behind: (tokens, out_features): dense minus present residual stream that the group's only linear adds its
            output to; None where its output goes elsewhere.
    """

    inputs: Tensor
    dense_inputs: Tensor
    behind: Tensor | None


class PairedStatistic(Protocol):
    """What is kept of the inputs of a group and of what they should have been."""

    def see(self, seen: Seen) -> None:
        """Take in one batch."""
        ...

    def merge(self) -> None:
        """Take in what the other processes of this walk have seen; see ranks.py."""
        ...


S = TypeVar("S", bound=Statistic)
P = TypeVar("P", bound=PairedStatistic)


class Method(Protocol[S]):
    """A technique that looks at inputs. Its `repr` tells it from others.

    `apply` depends on its arguments alone: a resumed walk repeats it and must get the same bytes.
    """

    def statistic(self, width: int, device: str) -> S:
        """Return an empty statistic for inputs of `width` features."""
        ...

    def apply(self, group: Group, statistic: S) -> Applied:
        """Change a group's weights."""
        ...


class PairedMethod(Protocol[P]):
    """A technique that also looks at the dense model's activations: `walk_paired` runs both, side by side."""

    def statistic(self, group: Group) -> P:
        """Return an empty statistic for a group."""
        ...

    def apply(self, group: Group, statistic: P) -> Applied:
        """Change a group's weights."""
        ...


class BlindMethod(Protocol):
    """A technique that looks at weights alone. Its `repr` tells it from others."""

    def apply(self, group: Group) -> Applied:
        """Change a group's weights."""
        ...
