"""FP8 as methods of the walk: a scale per output, per block of weights, or one for linears that share their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optikit.algorithms import fp8
from optikit.calibration import distributed
from optikit.calibration.method import Batch, Group, Result, RowMethod
from optikit.calibration.write_checkpoint import RoundedLayout

Rounds = Callable[[Tensor], dict[str, Tensor]]
"""Rounds some outputs, (rows, in) float32, to their packed tensors by suffix."""


def by_channel(weight: Tensor, *, dtype: torch.dtype, largest: float, search: bool) -> dict[str, Tensor]:
    """Round outputs with a scale each, stored in a dtype."""
    absmax = fp8.channel_absmax(weight)
    scales = fp8.of_absmax(absmax, dtype, largest)
    if search:
        scales = fp8.search_channels(weight, absmax, dtype, largest)
    return {"weight": fp8.quantize(weight, scales, largest), "weight_scale": scales}


def by_block(weight: Tensor, *, largest: float, search: bool) -> dict[str, Tensor]:
    """Round outputs with a scale per block; a multiple of 128 of them, or the last ones of a linear."""
    absmax = fp8.block_absmax(weight)
    scales = fp8.search_blocks(weight, absmax, largest) if search else fp8.of_absmax(absmax, largest=largest)
    spread = fp8.spread(scales, (weight.shape[0], weight.shape[1]))
    return {"weight": fp8.quantize(weight, spread, largest), "weight_scale_inv": scales}


@dataclass(frozen=True)
class Fp8Rows(RowMethod):
    """Round each output by itself, without calibration."""

    layout: RoundedLayout
    rounds: Rounds

    def rows(self, weight: Tensor, _: str, /) -> dict[str, Tensor]:
        """Round some outputs."""
        return self.rounds(weight)


class Seen:
    """The largest input of a group.

    Args:
        group: The linears that see the inputs.
    """

    def __init__(self, group: Group) -> None:
        self.absmax = torch.zeros((), device=group.weights[0].device)

    def update(self, batch: Batch) -> None:
        """Take in a batch's inputs."""
        self.absmax = torch.maximum(self.absmax, batch.inputs.abs().amax().float())

    def merge(self) -> None:
        """Add what the other processes have seen."""
        distributed.largest(self.absmax)


@dataclass(frozen=True)
class Fp8Calibrated:
    """The same beside calibration text, whose keys and values are watched: `rounds` takes each linear whole."""

    layout: RoundedLayout
    rounds: Rounds
    correct_damp: None = None

    def statistic(self, group: Group) -> Seen:
        """Return an empty statistic."""
        return Seen(group)

    def apply(self, group: Group, statistic: Seen) -> Result:
        """Round every linear of a group."""
        facts = {"largest_input": round(float(statistic.absmax), 4)}
        return _result(group, [self.rounds(weight) for weight in group.weights], self.layout, facts)


@dataclass(frozen=True)
class Fp8Static:
    """Round weights with one scale, and fix one for the inputs: the largest that calibration text has shown.

    Linears that see the same input share both: servers multiply them as one matrix, and would round those with the
    smaller scale a second time.
    """

    layout: RoundedLayout
    largest: float
    correct_damp: None = None

    def statistic(self, group: Group) -> Seen:
        """Return an empty statistic."""
        return Seen(group)

    def apply(self, group: Group, statistic: Seen) -> Result:
        """Round every linear of a group."""
        absmax = torch.stack([weight.abs().amax() for weight in group.weights]).amax()
        scale, inputs = (fp8.of_absmax(each, largest=self.largest) for each in (absmax, statistic.absmax))
        packed = [
            {
                "weight": fp8.quantize(weight, scale, self.largest),
                "weight_scale": scale.clone(),  # a file holds no tensor twice
                "input_scale": inputs.clone(),
            }
            for weight in group.weights
        ]
        facts = {"largest_input": round(float(statistic.absmax), 4)}
        return _result(group, packed, self.layout, facts)


def _result(
    group: Group, packed: list[dict[str, Tensor]], layout: RoundedLayout, facts: dict[str, float] | None = None
) -> Result:
    return Result(
        weights=tuple(layout.packing.dequantize(tensors) for tensors in packed),
        tensors={
            f"{name}.{suffix}": tensor
            for name, tensors in zip(group.names, packed, strict=True)
            for suffix, tensor in tensors.items()
        },
        facts={} if facts is None else dict.fromkeys(group.names, facts),
    )
