"""AWQ: give the input channels that carry most signal a finer grid, by scaling their weights up before rounding.

Paper   Lin et al. 2023, arXiv:2306.00978, sections 3.2 (scale search) and its code (clipping, duo scaling)
Cost    O(steps · rows · in²) time for the search, `rows` at most SEARCH_ROWS; one (in, in) Gram matrix
Differs the error of a candidate is tr(ΔW H ΔWᵀ) with H = XᵀX over all calibration tokens, not the output of a block run
        again: the same quantity at the linears' outputs, about a hundred times cheaper, and no sample of tokens.
        The size of an input channel is its root mean square, read off H, where the paper takes the mean of |X|.
        Families with and without the weights' own scale are searched together, from coarse to fine; no scale at all is
        a candidate.
        Clipping searches each group by its diagonal block of H, both ends of the range in proportion, with the
        least-squares scale for the codes found; query and key projections are clipped like any other
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
"""Quantizes a weight (out, in) float32 and returns what its codes stand for, same shape and dtype."""

SEARCH_ROWS = 1024
"""Output rows that the scale search looks at, evenly spaced; more change nothing that matters."""
COARSE = 4
"""Steps between the exponents tried first; around the best of them the distance is then halved down to one step."""
SMALLEST = 1e-4


@dataclass(frozen=True)
class Scaling:
    """The result of a scale search.

    Attributes:
        scale: (in,) float32, positive; inputs are divided by it, weight columns multiplied.
        alpha: Exponent that gave it; None where no scale was better.
        error: Squared output error of the rows looked at, with the scale.
        plain_error: The same without.
    """

    scale: Tensor
    alpha: float | None
    error: float
    plain_error: float


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """Return the squared error that a change of weights makes at each output: the diagonal of ΔW H ΔWᵀ.

    Args:
        delta: (out, in) float32.
        gram: (in, in) float32, H = XᵀX over all calibration tokens.

    Returns:
        (out,) float32, summed over tokens.
    """
    return ((delta @ gram) * delta).sum(dim=1)


def scale_of(input_size: Tensor, weight_size: Tensor | None, alpha: float) -> Tensor:
    """Return the scale (in,) of an exponent (equation 5): size(X)^alpha, over size(W)^(1 - alpha) for duo scaling.

    Its smallest and largest value are inverse to each other.

    Args:
        input_size: (in,) typical magnitude of each input channel, not all 0.
        weight_size: (in,) typical relative magnitude of each weight column; None leaves weights out.
        alpha: In [0, 1].
    """
    scale = (input_size / input_size.mean()).clamp_min(SMALLEST) ** alpha
    if weight_size is not None:
        scale = scale / (weight_size ** (1 - alpha) + SMALLEST)
    scale = scale.clamp_min(SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()  # as the paper's code has it


def weight_size_of(weight: Tensor, group_size: int) -> Tensor:
    """Return the mean over rows of each weight's magnitude relative to the largest of its group: (in,), in [0, 1]."""
    rows, width = weight.shape
    groups = weight.abs().reshape(rows, -1, group_size if group_size > 0 else width)
    return (groups / (groups.amax(dim=2, keepdim=True) + 1e-6)).reshape(rows, width).mean(dim=0)


def tie(size: Tensor, ties: Tensor | None) -> Tensor:
    """Give channels that must share a scale one size: the root of their mean square.

    Args:
        size: (in,).
        ties: (in,) int64, for each channel the channel of the previous op that it copies; None ties nothing.
    """
    if ties is None:
        return size
    count, ties = int(ties.max()) + 1, ties.to(size.device)
    total = torch.zeros(count, dtype=size.dtype, device=size.device).index_add_(0, ties, size.square())
    times = torch.bincount(ties, minlength=count).clamp_min(1)
    return (total / times).sqrt()[ties]


def search_scale(
    weight: Tensor,
    gram: Tensor,
    rounding: Rounding,
    *,
    group_size: int,
    ties: Tensor | None = None,
    steps: int = 20,
    powers: bool = False,
) -> Scaling:
    """Find the scale whose quantized weights err least at the outputs.

    Args:
        weight: (out, in) float32: the weights of all linears that share the input, stacked.
        gram: (in, in) float32, Xᵀ X over all calibration tokens.
        rounding: The quantizer.
        group_size: Weights of a row that share a step; -1 is the whole row.
        ties: (in,) int64: channels of equal number must get the same scale (heads that share a value head).
        steps: Exponents told apart, from 1/steps to 1, of which about half are tried.
        powers: Only powers of two are tried: dividing by them is exact.
    """
    sample = _rows(weight)
    input_size = tie(gram.diagonal().clamp_min(0).sqrt(), ties)
    weight_size = tie(weight_size_of(weight, group_size), ties)
    plain = torch.ones_like(input_size)
    plain_error = float(output_error(rounding(sample) - sample, gram).sum())
    unscaled = Scaling(plain, None, plain_error, plain_error)
    if not input_size.any():
        return unscaled

    def tried(family: Tensor | None, step: int) -> Scaling:
        scale = scale_of(input_size, family, step / steps)
        scale = scale.log2().round().exp2() if powers else scale
        error = float(output_error(rounding(sample * scale) / scale - sample, gram).sum())
        return Scaling(scale, step / steps, error, plain_error)

    found = (_least(partial(tried, family), steps) for family in (None, weight_size))
    return min((unscaled, *found), key=_error)


def _least(tried: Callable[[int], Scaling], steps: int) -> Scaling:
    """Return the best of a family: of a few exponents far apart, then of those around the best, nearer and nearer."""
    distance = min(COARSE, steps)
    found = {step: tried(step) for step in range(distance, steps + 1, distance)}
    while distance > 1:
        distance //= 2
        best = min(found, key=lambda step: found[step].error)
        found |= {step: tried(step) for step in (best - distance, best + distance) if 1 <= step <= steps}
    return min(found.values(), key=_error)


def _error(scaling: Scaling) -> float:
    return scaling.error


def _rows(weight: Tensor) -> Tensor:
    if len(weight) <= SEARCH_ROWS:
        return weight
    return weight[torch.linspace(0, len(weight) - 1, SEARCH_ROWS, device=weight.device).round().long()]


def fold(weight: Tensor, scale: Tensor, *, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Divide the weight of the norm before the linears by a scale; return also the exact scale after its rounding.

    A norm is stored in half precision: the quotient is rounded, and the linears are multiplied by the scale that the
    rounded one amounts to, so that the product is the same as before.

    Args:
        weight: (in,) the norm's weight, in its own dtype.
        scale: (in,) the scale wanted.
        offset: Added to the stored weight before it multiplies (Gemma: 1).

    Returns:
        The new weight (in,) in the same dtype, and the exact scale (in,) float32.
    """
    before = weight.float() + offset
    divided = (before / scale - offset).to(weight.dtype)
    after = divided.float() + offset
    exact = before / after
    usable = torch.isfinite(exact) & (exact > 0)
    return torch.where(usable, divided, weight), torch.where(usable, exact, 1.0)
