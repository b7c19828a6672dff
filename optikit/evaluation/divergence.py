"""KL divergence between a baseline's next-token distributions and a candidate's, on the same tokens.

The statistics are those of llama.cpp's `perplexity --kl-divergence`, so that figures can be put side by side; its
standard errors take tokens for independent, which makes them too small, so a window-block interval stands beside them.

The baseline's logits are computed once and kept: logits minus their maximum, as float16, two bytes each. Half
precision is finest where it matters, near the maximum: an error e of a log-probability enters the divergence as the
variance of e under the baseline, squared small, because the kept distribution is normalized again when it is read.
Measured against its own kept logits a model diverges by less than 1e-6 nats (llama.cpp's 16-bit files: 5e-4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optikit.evaluation import perplexity
from optikit.evaluation.statistics import Floats

Kept = NDArray[np.float16]
LOWEST = -65504.0
"""The lowest float16: its exp is zero in float64, too."""
PERCENTILES = (99.9, 99.0, 95.0, 90.0, 10.0, 5.0, 1.0, 0.1)
FEWEST_TOKENS = 100
"""Below this many tokens statistics of a divergence say nothing (llama.cpp refuses them, too)."""


def keep(logits: NDArray[np.float32]) -> Kept:
    """Return logits (m, vocab) minus their row maxima as float16: what a baseline stores."""
    kept = np.empty(logits.shape, np.float16)
    for start in range(0, len(logits), perplexity.ROWS):
        rows = slice(start, start + perplexity.ROWS)
        block = logits[rows] - logits[rows].max(axis=1, keepdims=True)
        kept[rows] = np.maximum(block, LOWEST, out=block)
    return kept


def token_divergence(kept: Kept, logits: NDArray[np.float32]) -> Floats:
    """Return KL(baseline ‖ candidate) per position, nats, float64 (m,): Σ p (log p - log q).

    `kept` (m, vocab) holds the baseline's logits as `keep` returns them, `logits` (m, vocab) the candidate's.
    """
    if kept.shape != logits.shape:
        msg = f"distributions over different vocabularies or positions: {kept.shape} and {logits.shape}"
        raise ValueError(msg)
    divergence = np.empty(len(kept))
    for start in range(0, len(kept), perplexity.ROWS):
        rows = slice(start, start + perplexity.ROWS)
        base, other = kept[rows].astype(np.float64), logits[rows].astype(np.float64)
        other -= other.max(axis=1, keepdims=True)
        gap = base - other
        weights = np.exp(base, out=base)
        total = weights.sum(axis=1)
        other_total = np.exp(other, out=other).sum(axis=1)
        divergence[rows] = (weights * gap).sum(axis=1) / total - np.log(total) + np.log(other_total)
    return divergence


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """llama.cpp's statistic set over n tokens; every `_se` is its standard error for independent tokens.

    Attributes:
        tokens: Number of scored positions.
        mean, mean_se, median, min, max: Of the divergence, nats.
        percentiles: Percentile → divergence, nats.
        ratio, ratio_se: Perplexity of the candidate divided by the baseline's.
        correlation: Of the two models' negative log-likelihoods; None where one of them doesn't vary.
        dp_mean, dp_mean_se, dp_rms: Change of the probability of the text's own token.
        dp_min, dp_max, dp_percentiles: Its extremes and percentiles.
        top1, top1_se: Share of positions where both models rank the same token first.
    """

    tokens: int
    mean: float
    mean_se: float
    median: float
    min: float
    max: float
    percentiles: dict[str, float]
    ratio: float
    ratio_se: float
    correlation: float | None
    dp_mean: float
    dp_mean_se: float
    dp_rms: float
    dp_min: float
    dp_max: float
    dp_percentiles: dict[str, float]
    top1: float
    top1_se: float


def statistics(divergence: Floats, baseline_nll: Floats, nll: Floats, same_top: NDArray[np.bool_]) -> Statistics:
    """Return the statistic set of n tokens, all arguments (n,): divergence, both models' NLL, same likeliest token.

    Raises:
        ValueError: Arrays of different lengths, or fewer than 100 tokens.
    """
    n = len(divergence)
    if not n == len(baseline_nll) == len(nll) == len(same_top):
        msg = f"arrays of different lengths: {n}, {len(baseline_nll)}, {len(nll)}, {len(same_top)}"
        raise ValueError(msg)
    if n < FEWEST_TOKENS:
        msg = f"{n} tokens are too few for statistics of a divergence; at least {FEWEST_TOKENS} are needed"
        raise ValueError(msg)
    change = np.exp(-nll) - np.exp(-baseline_nll)
    ratio = math.exp(float((nll - baseline_nll).mean()))
    agreement = float(same_top.mean())
    varies = float(nll.std()) > 0 and float(baseline_nll.std()) > 0
    return Statistics(
        tokens=n,
        mean=float(divergence.mean()),
        mean_se=_standard_error(divergence),
        median=float(np.median(divergence)),
        min=float(divergence.min()),
        max=float(divergence.max()),
        percentiles=_percentiles(divergence),
        ratio=ratio,
        ratio_se=ratio * _standard_error(nll - baseline_nll),
        correlation=float(np.corrcoef(baseline_nll, nll)[0, 1]) if varies else None,
        dp_mean=float(change.mean()),
        dp_mean_se=_standard_error(change),
        dp_rms=math.sqrt(float((change**2).mean())),
        dp_min=float(change.min()),
        dp_max=float(change.max()),
        dp_percentiles=_percentiles(change),
        top1=agreement,
        top1_se=math.sqrt(agreement * (1 - agreement) / (n - 1)),
    )


def histogram(divergence: Floats, *, bins: int = 24, lowest: float = 1e-7) -> tuple[tuple[float, float, int], ...]:
    """Return logarithmic bins (from, to, count) that hold every value of `divergence`; the first starts at zero."""
    top = max(float(divergence.max()) * (1 + 1e-12), 10 * lowest)
    inner = np.geomspace(lowest, top, bins)
    edges = np.concatenate([[min(0.0, float(divergence.min()))], inner])
    counts, _ = np.histogram(divergence, edges)
    return tuple((float(a), float(b), int(c)) for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True))


def _standard_error(values: Floats) -> float:
    return math.sqrt(max(0.0, float((values**2).mean()) - float(values.mean()) ** 2) / (len(values) - 1))


def _percentiles(values: Floats) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES)
    return {f"p{percentile:g}": float(value) for percentile, value in zip(PERCENTILES, found, strict=True)}
