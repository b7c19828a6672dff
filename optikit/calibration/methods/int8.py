"""INT8 as methods of the walk: weights per output channel, for servers that round inputs per token (w8a8, LLM.int8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optikit.algorithms import awq, int8, smoothquant
from optikit.calibration import distributed
from optikit.calibration.gram import Gram
from optikit.calibration.method import Batch, Group, Result, RowMethod
from optikit.calibration.methods.fold import fold
from optikit.calibration.write_checkpoint import RoundedLayout, ScaledLayout
from optikit.formats import compressed_tensors, llm_int8

SAMPLE_TOKENS = 512
"""Least number of tokens whose inputs are kept for measuring their rounding error."""


@dataclass(frozen=True)
class LlmInt8(RowMethod):
    """Round weights to int8 with a scale per output channel, for bitsandbytes to serve."""

    layout: RoundedLayout

    def rows(self, weight: Tensor, _: str, /) -> dict[str, Tensor]:
        """Round some outputs."""
        scales = int8.scales_of(weight)
        return llm_int8.pack(int8.quantize(weight, scales), scales)


class Ranges:
    """What rounding of inputs to int8 depends on: Gram matrix, each channel's absmax, a sample spread over all tokens.

    Args:
        group: The linears that see the inputs.
    """

    def __init__(self, group: Group) -> None:
        device = group.weights[0].device
        self.gram = Gram(group)
        self.absmax = torch.zeros(group.width, device=device)
        self._sample = torch.empty((0, group.width), device=device)
        self._stride, self._tokens = 1, 0

    @property
    def sample(self) -> Tensor:
        """Inputs of evenly spaced tokens, (n, width) float32; n is at least SAMPLE_TOKENS where there are as many."""
        return self._sample

    def update(self, batch: Batch) -> None:
        """Take in a batch's inputs."""
        self.gram.update(batch)
        inputs = batch.inputs.float()
        self.absmax = torch.maximum(self.absmax, inputs.abs().amax(dim=0))
        self._sample = torch.cat([self._sample, inputs[-self._tokens % self._stride :: self._stride]])
        self._tokens += len(inputs)
        while len(self._sample) > 2 * SAMPLE_TOKENS:
            self._sample = self._sample[::2].clone()
            self._stride *= 2

    def merge(self) -> None:
        """Add what the other processes have seen."""
        self.gram.merge()
        distributed.largest(self.absmax)
        self._sample = distributed.gathered(self._sample)


@dataclass(frozen=True)
class W8A8:
    """Smooth, then round weights to int8 with a scale per output channel.

    Attributes:
        layout: The packing.
        dtype: Of the scales: the checkpoint's own.
        strengths: Migration strengths to choose from, beside no smoothing.
    """

    layout: ScaledLayout
    dtype: torch.dtype
    strengths: tuple[float, ...]
    correct_damp: None = None

    def statistic(self, group: Group) -> Ranges:
        """Return an empty statistic."""
        return Ranges(group)

    def apply(self, group: Group, statistic: Ranges) -> Result:
        """Quantize a group."""
        weight, gram = group.target, statistic.gram.mean()
        found = smoothquant.search(
            weight,
            gram,
            statistic.absmax,
            statistic.sample,
            1,
            strengths=self.strengths if group.previous else (),
            ties=group.previous.ties if group.previous else None,
        )
        scale = found.scale
        tensors: dict[str, Tensor] = {}
        if group.previous is not None and found.alpha is not None:
            tensors, scale = fold(group.previous, scale, suffix="weight_scale", axis=0)
        scales = int8.scales_of(weight * scale, self.dtype)
        codes = int8.quantize(weight * scale, scales)
        back = int8.dequantize(codes, scales) / scale
        for name, *parts in zip(group.names, group.split(codes), group.split(scales), strict=True):
            packed = compressed_tensors.pack(*parts)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        norm = float(awq.output_error(weight, gram).sum())
        losses = {"loss": found.error / norm, "plain_loss": found.plain_error / norm} if norm > 0 else {"loss": 0.0}
        facts = {"alpha": found.alpha, **losses}
        return Result(weights=group.split(back), tensors=tensors, facts=dict.fromkeys(group.names, facts))
