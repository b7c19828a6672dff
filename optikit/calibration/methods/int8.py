"""DOCSTRING optikit.calibration.methods.int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optikit.algorithms import awq, int8, smoothquant
from optikit.calibration import distributed
from optikit.calibration.gram import Gram
from optikit.calibration.method import Applied, Group
from optikit.calibration.methods.fold import _split, fold
from optikit.formats import compressed_tensors, llm_int8

SAMPLE_TOKENS = 512
"""At least so many tokens' inputs are kept, where there are as many, to see how they round."""


@dataclass(frozen=True)
class LlmInt8:
    """Round weights to int8 with a scale per output channel, for bitsandbytes to serve."""

    def apply(self, group: Group) -> Applied:
        """Round every linear of a group."""
        weights: list[Tensor] = []
        tensors: dict[str, Tensor] = {}
        for name, weight in zip(group.names, group.weights, strict=True):
            scales = int8.scales_of(weight)
            codes = int8.quantize(weight, scales)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in llm_int8.pack(codes, scales).items()}
            weights.append(int8.dequantize(codes, scales))
        return Applied(weights=tuple(weights), tensors=tensors)


class Ranges:
    """What decides how inputs round to int8: their Gram matrix, their extremes, and a sample spread over all tokens.

    Args:
        width: Input features.
        device: Where it is kept.
    """

    def __init__(self, width: int, device: str) -> None:
        self.gram = Gram(width, device)
        self.extreme = torch.zeros(width, device=device)
        self._sample = torch.empty((0, width), device=device)
        self._stride, self._tokens = 1, 0

    @property
    def sample(self) -> Tensor:
        """(n, width) float32 inputs of every so many-th token, at least SAMPLE_TOKENS where there are as many."""
        return self._sample

    def update(self, inputs: Tensor) -> None:
        """Take in (tokens, width) inputs."""
        self.gram.update(inputs)
        inputs = inputs.float()
        self.extreme = torch.maximum(self.extreme, inputs.abs().amax(dim=0))
        self._sample = torch.cat([self._sample, inputs[-self._tokens % self._stride :: self._stride]])
        self._tokens += len(inputs)
        while len(self._sample) > 2 * SAMPLE_TOKENS:
            self._sample = self._sample[::2].clone()
            self._stride *= 2

    def merge(self) -> None:
        """Add what the other processes have seen."""
        self.gram.merge()
        distributed.largest(self.extreme)
        self._sample = distributed.gathered(self._sample)


@dataclass(frozen=True)
class W8A8:
    """Smooth, then round weights to int8 with a scale per output channel.

    Attributes:
        dtype: Of the scales: the checkpoint's own.
        strengths: Migration strengths to choose from, beside no smoothing.
    """

    dtype: torch.dtype
    strengths: tuple[float, ...]

    def statistic(self, width: int, device: str) -> Ranges:
        """Return an empty statistic."""
        return Ranges(width, device)

    def apply(self, group: Group, statistic: Ranges) -> Applied:
        """Quantize a group."""
        weight, gram = torch.cat(group.weights), statistic.gram.mean()
        found = smoothquant.search(
            weight,
            gram,
            statistic.extreme,
            statistic.sample,
            1,
            strengths=self.strengths if group.feeder else (),
            ties=group.feeder.ties if group.feeder else None,
        )
        scale = found.scale
        tensors: dict[str, Tensor] = {}
        if group.feeder is not None and found.alpha is not None:
            tensors, scale = fold(group.feeder, scale, suffix="weight_scale", axis=0)
        scales = int8.scales_of(weight * scale, self.dtype)
        codes = int8.quantize(weight * scale, scales)
        back = int8.dequantize(codes, scales) / scale
        for name, *parts in zip(group.names, _split(codes, group), _split(scales, group), strict=True):
            packed = compressed_tensors.pack(*parts)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        norm = float(awq.output_error(weight, gram).sum())
        losses = {"loss": found.error / norm, "plain_loss": found.plain_error / norm} if norm > 0 else {"loss": 0.0}
        facts = {"alpha": found.alpha, **losses}
        return Applied(weights=_split(back, group), tensors=tensors, facts=dict.fromkeys(group.names, facts))
