"""AWQ and SmoothQuant as methods of the walk: scale a group's inputs, fold the inverse into its feeder, quantize."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optikit.algorithms import awq, gptq, int8, nf4, rtn, smoothquant
from optikit.algorithms.grid import Grid, Quantized, dequantize, fit, pruned_mask
from optikit.calibration import ranks
from optikit.calibration.gram import Gram
from optikit.calibration.method import Applied, Feeder, Group
from optikit.formats import awq as awq_format
from optikit.formats import compressed_tensors, llm_int8
from optikit.formats import nf4 as nf4_format

SAMPLE_TOKENS = 512
"""At least so many tokens' inputs are kept, where there are as many, to see how they round."""


def fold(feeder: Feeder, scale: Tensor, *, suffix: str, axis: int) -> tuple[dict[str, Tensor], Tensor]:
    """Divide what a feeder gives by a scale, channel by channel.

    What is stored has a precision of its own: the linears that follow have to be multiplied by the scale that the
    rounded quotient amounts to, so that nothing is lost.

    Args:
        feeder: A norm, or a linear that the walk has quantized just before.
        scale: (in,) of the group, the same for channels that are copies of one.
        suffix: Name of a quantized linear's scales.
        axis: Which axis of them counts the linear's outputs.

    Returns:
        The feeder's tensors that change, by full name; and the scale (in,) that its outputs are really divided by.
    """
    per_row = scale if feeder.ties is None else _representatives(scale, feeder.ties)
    if feeder.linear:
        name = f"{feeder.name}.{suffix}"
        divided, exact = _divide_rows(feeder.tensors[name].to(scale.device).movedim(axis, 0), per_row)
        divided = divided.movedim(0, axis).contiguous()
    else:
        name = f"{feeder.name}.weight"
        divided, exact = awq.fold(feeder.tensors[name].to(scale.device), per_row, offset=feeder.offset)
    changed = {name: divided}
    bias = feeder.tensors.get(f"{feeder.name}.bias")
    if bias is not None:
        changed[f"{feeder.name}.bias"] = (bias.to(scale.device).float() / exact).to(bias.dtype)
    return changed, exact if feeder.ties is None else exact[feeder.ties]


def _representatives(scale: Tensor, ties: Tensor) -> Tensor:
    """Return the scale of each channel of the feeder: (in,) → (out of the feeder,)."""
    per_row = torch.ones(int(ties.max()) + 1, device=scale.device)
    per_row[ties] = scale
    return per_row


def _divide_rows(stored: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Divide (rows, n) by (rows,) in its own dtype; return the quotient and what it was divided by, least squares."""
    before = stored.float()
    after = (before / by[:, None]).to(stored.dtype).float()
    norm = after.square().sum(dim=1)
    exact = (before * after).sum(dim=1) / norm
    usable = torch.isfinite(exact) & torch.isfinite(after).all(dim=1) & (after != 0).all(dim=1)
    return torch.where(usable[:, None], after, before).to(stored.dtype), torch.where(usable, exact, 1.0)


def _split(stacked: Tensor, group: Group) -> tuple[Tensor, ...]:
    return torch.split(stacked, [len(weight) for weight in group.weights])


@dataclass(frozen=True)
class Awq:
    """Scale salient channels up, then quantize to 4 bits.

    Attributes:
        grid: The grid of the scaled weights.
        steps: Scales tried for each of two families.
        damp: Round by GPTQ with this damping; None rounds to nearest.
    """

    grid: Grid
    steps: int
    damp: float | None = None

    def statistic(self, width: int, device: str) -> Gram:
        """Return an empty Gram matrix."""
        return Gram(width, device)

    def apply(self, group: Group, statistic: Gram) -> Applied:
        """Quantize a group."""
        weight, gram = torch.cat(group.weights), statistic.mean()
        plain = torch.ones(group.width, device=weight.device)
        scale, alpha, folded = self._scaled(group, weight, gram)
        if alpha is not None and self._error(weight, gram, scale) >= self._error(weight, gram, plain):
            scale, alpha, folded = plain, None, {}  # better with ranges spanning extremes, not with searched ones
        quantized = self._round(weight * scale, gram / scale / scale[:, None])
        back = dequantize(*quantized) / scale
        tensors = dict(folded)
        for name, *parts in zip(group.names, *(_split(part, group) for part in quantized), strict=True):
            packed = awq_format.pack(*parts)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        facts = {"alpha": alpha, "loss": _relative(back - weight, weight, gram)}
        return Applied(weights=_split(back, group), tensors=tensors, facts=dict.fromkeys(group.names, facts))

    def _scaled(self, group: Group, weight: Tensor, gram: Tensor) -> tuple[Tensor, float | None, dict[str, Tensor]]:
        plain = torch.ones(group.width, device=weight.device)
        if group.feeder is None:
            return plain, None, {}
        spanning = replace(self.grid, search=False)
        found = awq.search_scale(
            weight,
            gram,
            lambda scaled: dequantize(*rtn.quantize(scaled, spanning)),
            group_size=self.grid.group_size,
            ties=group.feeder.ties,
            steps=self.steps,
        )
        if found.alpha is None:
            return plain, None, {}
        folded, exact = fold(group.feeder, found.scale, suffix="scales", axis=1)
        return exact, found.alpha, folded

    def _error(self, weight: Tensor, gram: Tensor, scale: Tensor) -> float:
        """Return the squared output error of rounding to nearest."""
        rounded = self._nearest(weight * scale, gram.diagonal() / scale.square())
        return float(awq.output_error(dequantize(*rounded) / scale - weight, gram).sum())

    def _nearest(self, scaled: Tensor, diagonal: Tensor) -> Quantized:
        floor = 1e-6 * float(diagonal.mean()) or 1.0  # a channel that is never active costs a little, too
        rounded = rtn.nearest(scaled, self.grid, fit(scaled, self.grid, diagonal.clamp_min(floor)))
        return rtn.masked(rounded, pruned_mask(scaled))

    def _round(self, scaled: Tensor, gram: Tensor) -> Quantized:
        if self.damp is None:
            return self._nearest(scaled, gram.diagonal())
        return gptq.quantize(scaled, gram, self.grid, damp=self.damp, mask=pruned_mask(scaled)).quantized


def _relative(error: Tensor, weight: Tensor, gram: Tensor) -> float:
    """Return the squared error of the outputs, relative to their own squared norm."""
    norm = float(awq.output_error(weight, gram).sum())
    return float(awq.output_error(error, gram).sum()) / norm if norm > 0 else 0.0


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


@dataclass(frozen=True)
class Nf4:
    """Round weights to NF4, for bitsandbytes to serve.

    Attributes:
        double_quant: Quantize the constants of blocks, too.
        dtype: What a server computes in, as torch names it.
    """

    double_quant: bool
    dtype: str

    def apply(self, group: Group) -> Applied:
        """Round every linear of a group."""
        weights: list[Tensor] = []
        tensors: dict[str, Tensor] = {}
        for name, weight in zip(group.names, group.weights, strict=True):
            codes, extremes = nf4.quantize(weight)
            constants = nf4.quantize_constants(extremes) if self.double_quant else extremes
            packed = nf4_format.pack(codes, constants, (weight.shape[0], weight.shape[1]), self.dtype)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
            read = nf4.dequantize_constants(constants) if isinstance(constants, nf4.Constants) else extremes
            weights.append(nf4.dequantize(codes, read).view_as(weight))
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
        ranks.largest(self.extreme)
        self._sample = ranks.gathered(self._sample)


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
