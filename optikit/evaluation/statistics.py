"""Statistics that decisions rest on: paired, seeded, exact where they can be, and three-valued in their verdicts.

Tokens of one window depend on each other, so windows, not tokens, are what the bootstrap draws (a token-wise standard
error is too small). Runs of a speed test drift with the machine, so arms are compared pair by pair. Intervals from few
samples come out too short when percentiles are taken as they are; the percentiles are moved outward as far as
Student's t is wider than the normal distribution (Hesterberg 2015, arXiv:1411.5279, section 5.3, "expanded
percentile"). Where samples are too few for that, Student's t itself is used.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import count
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from optikit.evaluation.results import Interval

Floats = NDArray[np.float64]
Change = Literal["faster", "slower", "no measurable change"]

REPETITIONS = 10_000
"""Bootstrap draws: the Monte Carlo error of a 2.5 % tail is then 0.16 %."""

FEWEST_BLOCKS = 8
"""Below this many windows the bootstrap of a mean has too few distinct draws; Student's t is used."""

LEVEL = 0.95
"""Confidence of every interval, unless one of several looks at the same test asks for more."""


def mean_interval(values: Floats, *, seed: int = 0, level: float = LEVEL) -> Interval:
    """Return the interval, 95 % unless told otherwise, of the mean of `values` (n,), one value per independent block.

    Raises:
        ValueError: Fewer than two values: one block says nothing about how blocks differ.
    """
    blocks = _at_least_two(values)
    if blocks < FEWEST_BLOCKS:
        return _student_interval(values, level)
    means = [values[draws].mean(axis=1) for draws in _draws(blocks, seed)]
    return _expanded_percentiles(np.concatenate(means), blocks, level)


def block_means(values: Floats) -> Floats:
    """Return one value per block of `values` (blocks, tokens), whose mean is the mean of all tokens.

    A block that is shorter than the longest ends with NaN. Blocks of one length give their means; blocks of several
    lengths give the linearized ratio of sums, for the tokens weigh the same, not the blocks.
    """
    known = ~np.isnan(values)
    tokens = known.sum(axis=1)
    if (tokens == values.shape[1]).all():
        means: Floats = values.mean(axis=1)
        return means
    sums = np.where(known, values, 0.0).sum(axis=1)
    mean = sums.sum() / tokens.sum()
    linear: Floats = mean + (sums - mean * tokens) / tokens.mean()
    return linear


def perplexity_ratio(
    baseline: Floats, candidate: Floats, *, seed: int = 0, level: float = LEVEL
) -> tuple[float, Interval]:
    """Return exp of the mean difference of two (windows, tokens) arrays of negative log-likelihoods, and its interval.

    The same windows through both models: the difference per window is what is drawn. Shorter windows end with NaN.
    """
    if baseline.shape != candidate.shape:
        msg = f"negative log-likelihoods of different windows: {baseline.shape} and {candidate.shape}"
        raise ValueError(msg)
    difference = block_means(candidate - baseline)
    low, high = mean_interval(difference, seed=seed, level=level)
    return math.exp(float(difference.mean())), (math.exp(low), math.exp(high))


def fewest_for_a_median(level: float) -> int:
    """Return how many samples an interval of their median needs: the range of n samples misses it with 2¹⁻ⁿ.

    >>> fewest_for_a_median(0.95), fewest_for_a_median(0.99)
    (6, 8)
    """
    return math.ceil(1 - math.log2(1 - level))


def median_interval(values: Floats, *, seed: int = 0, level: float = LEVEL) -> Interval:
    """Return the interval of the median of `values` (n,); where they are too few, Student's interval of the mean.

    At 95 %, six are needed, see `fewest_for_a_median`.
    """
    count_ = _at_least_two(values)
    if count_ < fewest_for_a_median(level):
        return _student_interval(values, level)
    middle = [(count_ - 1) // 2, count_ // 2]
    medians = [np.sort(values[draws], axis=1)[:, middle].mean(axis=1) for draws in _draws(count_, seed)]
    return _expanded_percentiles(np.concatenate(medians), count_, level)


def paired_ratio(baseline: Floats, candidate: Floats, *, seed: int = 0, level: float = LEVEL) -> tuple[float, Interval]:
    """Return the median over pairs of baseline / candidate times (n,), and its interval over pairs.

    Times in, so a value above one means that the candidate is faster. The ratio is taken within each pair, because what
    slows the machine for a while slows both of them; then no burst can move the median far. Where pairs are too few
    for a median's interval: the geometric mean of the ratios with Student's interval.
    """
    if baseline.shape != candidate.shape:
        msg = f"times are not paired: {baseline.shape} and {candidate.shape}"
        raise ValueError(msg)
    if not (np.all(baseline > 0) and np.all(candidate > 0)):
        msg = "times must be positive"
        raise ValueError(msg)
    logs = np.log(baseline / candidate)
    low, high = median_interval(logs, seed=seed, level=level)
    middle = np.median(logs) if len(logs) >= fewest_for_a_median(level) else logs.mean()
    return math.exp(float(middle)), (math.exp(low), math.exp(high))


def noise_floor(interval: Interval) -> float:
    """Return how far the ratio of an arm to itself strays from one: the farther end of its interval.

    >>> round(noise_floor((0.98, 1.05)), 9)
    0.05
    """
    return max(abs(1 - interval[0]), abs(interval[1] - 1))


def speed_change(value: float, interval: Interval, floor: float) -> Change:
    """Name a speed ratio: a change is one whose interval excludes one and that is larger than the noise floor.

    >>> speed_change(1.3, (1.2, 1.4), 0.05), speed_change(1.03, (1.01, 1.05), 0.05)
    ('faster', 'no measurable change')
    """
    if interval[0] <= 1 <= interval[1] or abs(value - 1) < floor:
        return "no measurable change"
    return "faster" if value > 1 else "slower"


def mcnemar(lost: int, won: int) -> float:
    """Return the exact one-sided p-value that items lost outnumber items won by chance: P[Bin(lost + won, ½) ≥ lost].

    `lost` counts items right in the baseline and wrong in the candidate, `won` the reverse; items on which both agree
    say nothing.

    >>> round(mcnemar(40, 22), 4)
    0.015
    """
    if lost < 0 or won < 0:
        msg = f"counts can't be negative: {lost}, {won}"
        raise ValueError(msg)
    flips = lost + won
    ways, tail = 1, 0
    for kept in range(won + 1):  # P[≥ lost] = P[≤ won], counted in exact integers
        tail += ways
        ways = ways * (flips - kept) // (kept + 1)
    return float(tail / 2**flips)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return p-values adjusted by Holm's step-down method: to be compared with the level of the whole family.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return tuple(adjusted)


def share_interval(right: int, items: int) -> Interval:
    """Return Wilson's 95 % interval of a share: never empty, also where none or all of the items are right.

    >>> [round(end, 3) for end in share_interval(0, 20)]
    [0.0, 0.161]
    """
    z = NormalDist().inv_cdf(0.975)
    share, spread = right / items, z * z / items
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_change_interval(lost: int, won: int, items: int) -> Interval:
    """Return the 95 % interval of (won - lost) / items for paired items: Wald's with half an item added to each cell.

    Paper: Agresti and Min 2005, doi:10.1002/sim.1781. Not empty where nothing flipped: few items prove little.

    >>> [round(end, 3) for end in paired_change_interval(0, 0, 20)]
    [-0.089, 0.089]
    """
    total, fewer, more = items + 2, lost + 0.5, won + 0.5
    change = (more - fewer) / total
    half = NormalDist().inv_cdf(0.975) * math.sqrt((fewer + more) / total - change**2) / math.sqrt(total)
    return max(-1.0, change - half), min(1.0, change + half)


def detectable_flips(items: int, flip_rate: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest change of accuracy that `items` paired items can show: (z_level + z_power)·√(flips/items).

    `flip_rate` is the share of items whose correctness changes either way (arXiv:2605.28873).

    >>> round(100 * detectable_flips(200, 0.05), 1)
    4.4
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * math.sqrt(flip_rate / items)


def detectable_shift(values: Floats, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest shift of the mean that as many blocks as `values` (n,), as scattered, would show."""
    blocks = _at_least_two(values)
    error = float(values.std(ddof=1)) / math.sqrt(blocks)
    return (student_quantile(1 - alpha / 2, blocks - 1) + NormalDist().inv_cdf(power)) * error


def requests_needed(percentile: float, *, over_limit: int = 0, confidence: float = 0.99) -> int:
    """Return how many requests support a claim about a tail percentile with `over_limit` of them beyond it.

    MLPerf Inference's early stopping: the smallest n with P[Bin(n, 1 - percentile) ≤ over_limit] ≤ 1 - confidence.

    >>> requests_needed(0.90), requests_needed(0.95), requests_needed(0.99, over_limit=3)
    (44, 90, 1001)
    """
    if not 0 < percentile < 1 or not 0 < confidence < 1:
        msg = f"percentile {percentile} and confidence {confidence} must lie between 0 and 1"
        raise ValueError(msg)
    over = 1 - percentile
    return next(
        n
        for n in count(over_limit + 1)
        if sum(math.comb(n, k) * over**k * percentile ** (n - k) for k in range(over_limit + 1)) <= 1 - confidence
    )


def student_cdf(t: float, freedom: int) -> float:
    """Return P[T ≤ t] for Student's t with integer degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2 == 1
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= square * (k + 1) / (k + 2)
    share = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + share) / 2


@cache
def student_quantile(p: float, freedom: int) -> float:
    """Return the t with P[T ≤ t] = p, by bisection.

    >>> round(student_quantile(0.975, 7), 4)
    2.3646
    """
    if freedom > 1000:  # differs from the normal quantile by less than 0.2 %
        return NormalDist().inv_cdf(p)
    return _bisect(lambda t: student_cdf(t, freedom) < p, -1e4, 1e4)


def _bisect(below: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2


def _draws(samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield bootstrap draws (batch, samples) of indices, `REPETITIONS` in all, in batches of 32 MB at most."""
    draw = np.random.default_rng(seed)
    batch = max(1, 4_000_000 // samples)
    for done in range(0, REPETITIONS, batch):
        yield draw.integers(0, samples, (min(batch, REPETITIONS - done), samples))


def _at_least_two(values: Floats) -> int:
    if values.ndim != 1 or len(values) < 2:
        msg = f"an interval needs at least two values in one dimension, got shape {values.shape}"
        raise ValueError(msg)
    return len(values)


def _student_interval(values: Floats, level: float) -> Interval:
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half = student_quantile((1 + level) / 2, len(values) - 1) * error
    return mean - half, mean + half


def _expanded_percentiles(draws: Floats, samples: int, level: float) -> Interval:
    reach = math.sqrt(samples / (samples - 1)) * student_quantile((1 + level) / 2, samples - 1)
    tail = NormalDist().cdf(-reach)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
