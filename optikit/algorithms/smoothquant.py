"""SmoothQuant: divide each input channel by a scale and multiply its weights by it, so that both fit into INT8.

Paper   Xiao et al. 2022, arXiv:2211.10438, equations 3 and 4
Cost    O(steps · out · in²) time, one (in, in) Gram matrix, a sample of inputs
Differs alpha is searched for every group of linears that share an input, instead of one value for the model; the
        error is measured at their outputs: of the weights through the Gram matrix over all tokens, of the activations
        by rounding a sample of tokens as the kernel does
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optikit.algorithms import int8
from optikit.algorithms.awq import output_error

STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Migration strengths tried."""
SMALLEST = 1e-5
"""Lower bound of a channel's absmax, as the paper's code has it: dead channels get a finite scale."""


@dataclass(frozen=True)
class Smoothing:
    """The result of a search.

    Attributes:
        scale: (in,) float32; inputs are divided by it, weight columns multiplied. All ones where nothing was better.
        alpha: Migration strength that gave it; None where nothing was better than no scale.
        error: Summed squared output error, estimated over all tokens.
        plain_error: The same without smoothing.
    """

    scale: Tensor
    alpha: float | None
    error: float
    plain_error: float


def scale_of(input_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """Return s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (equation 4).

    Args:
        input_max: (in,) largest magnitude of each input channel over the calibration tokens.
        weight_max: (in,) largest magnitude of each weight column.
        alpha: Migration strength: 0 leaves the difficulty with the activations, 1 gives it to the weights.
    """
    s = input_max.clamp_min(SMALLEST) ** alpha / weight_max.clamp_min(SMALLEST) ** (1 - alpha)
    return s.clamp_min(SMALLEST)


def w8a8_error(weight: Tensor, gram: Tensor, sample: Tensor, tokens: int, scale: Tensor) -> float:
    """Estimate the squared error of the outputs if both factors are rounded to INT8 after smoothing.

    Rounding errors of weights and of activations are taken as independent: their squares add up.

    Args:
        weight: (out, in) float32, all linears of the group.
        gram: (in, in) float32, Xᵀ X over all calibration tokens.
        sample: (n, in) some of those tokens.
        tokens: How many tokens `gram` sums over.
        scale: (in,) smoothing scale.
    """
    smoothed = weight * scale
    of_weights = output_error(int8.round_trip(smoothed) / scale - weight, gram)
    divided = sample / scale
    of_inputs = (int8.round_tokens(divided) - divided) @ smoothed.T
    return float(of_weights.sum()) + float(of_inputs.square().sum()) * tokens / len(sample)


def tie(absmax: Tensor, ties: Tensor | None) -> Tensor:
    """Give channels that must share a scale one absmax, the largest.

    Args:
        absmax: (in,).
        ties: (in,) int64, for each channel the channel of the previous op that it copies; None ties nothing.
    """
    if ties is None:
        return absmax
    largest = absmax.new_zeros(int(ties.max()) + 1)
    ties = ties.to(absmax.device)
    return largest.scatter_reduce_(0, ties, absmax, "amax")[ties]


def search(
    weight: Tensor,
    gram: Tensor,
    input_max: Tensor,
    sample: Tensor,
    tokens: int,
    *,
    strengths: Sequence[float] = STRENGTHS,
    ties: Tensor | None = None,
) -> Smoothing:
    """Find the migration strength with the least error.

    Args:
        weight: (out, in) float32: the weights of all linears that share the input, stacked.
        gram: (in, in) float32, Xᵀ X over all calibration tokens.
        input_max: (in,) largest magnitude of each input channel over those tokens.
        sample: (n, in) float32, some of those tokens.
        tokens: How many tokens `gram` sums over.
        strengths: Values of alpha to try beside no smoothing.
        ties: (in,) int64: channels of equal number must get the same scale (heads that share a value head).
    """
    plain = torch.ones_like(input_max, dtype=torch.float32)
    plain_error = w8a8_error(weight, gram, sample, tokens, plain)
    best = Smoothing(plain, None, plain_error, plain_error)
    input_max, weight_max = tie(input_max.float(), ties), tie(weight.abs().amax(dim=0), ties)
    for alpha in strengths:
        scale = scale_of(input_max, weight_max, alpha)
        error = w8a8_error(weight, gram, sample, tokens, scale)
        if error < best.error:
            best = Smoothing(scale, alpha, error, plain_error)
    return best
