"""Items that changed sides: equal accuracy can hide many answers lost and as many won.

Paper   Dutta et al., "Accuracy is Not All You Need", NeurIPS 2024, arXiv:2407.09141 (flips);
        arXiv:2602.10144 (exact McNemar on paired items); Holm 1979 for several tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from optikit.evaluation import statistics
from optikit.evaluation.results import Interval

Bools = NDArray[np.bool_]
REPETITIONS = 100_000
LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Flips:
    """A candidate against a baseline on the same items of one task.

    Attributes:
        items: Number of items.
        baseline, candidate: Accuracy.
        change, change_ci95: Candidate minus baseline, with the interval over items.
        lost, won: Items right before and wrong now; wrong before and right now.
        flip_rate: Share of items that changed sides.
        changed_answers: Share of items with another answer, right or not; None where answers aren't given.
        p_worse: Exact one-sided McNemar p-value that the candidate is worse.
        detectable: Smallest drop that this many items would show with 80 % power, at this flip rate.
    """

    items: int
    baseline: float
    candidate: float
    change: float
    change_ci95: Interval
    lost: int
    won: int
    flip_rate: float
    changed_answers: float | None
    p_worse: float
    detectable: float


def compare(
    baseline: Bools,
    candidate: Bools,
    *,
    answers: tuple[Sequence[object], Sequence[object]] | None = None,
) -> Flips:
    """Compare correctness (n,) of two models on the same items in the same order; `answers` are both models' own.

    Raises:
        ValueError: Arrays of different lengths.
    """
    if baseline.shape != candidate.shape:
        msg = f"correctness of different items: {baseline.shape} and {candidate.shape}"
        raise ValueError(msg)
    lost, won = int((baseline & ~candidate).sum()), int((~baseline & candidate).sum())
    items = len(baseline)
    changed = None
    if answers is not None:
        changed = sum(before != after for before, after in zip(*answers, strict=True)) / items
    return Flips(
        items=items,
        baseline=float(baseline.mean()),
        candidate=float(candidate.mean()),
        change=(won - lost) / items,
        change_ci95=statistics.paired_change_interval(lost, won, items),
        lost=lost,
        won=won,
        flip_rate=(lost + won) / items,
        changed_answers=changed,
        p_worse=statistics.mcnemar(lost, won),
        detectable=statistics.detectable_flips(items, max(lost + won, 1) / items),
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Several tasks together.

    Attributes:
        p_worse: Pooled one-sided p-value that the candidate is worse on the mean over tasks.
        p_by_task: Each task's own p-value, adjusted for their number (Holm).
        worse: Tasks whose adjusted p-value is below 5 %.
        change, change_ci95: Mean over tasks of the change of accuracy, with its interval.
        conclusion: `worse` if the pooled test or any task says so.
    """

    p_worse: float
    p_by_task: Mapping[str, float]
    worse: tuple[str, ...]
    change: float
    change_ci95: Interval
    conclusion: Literal["worse", "no measurable loss"]


def over_tasks(tasks: Mapping[str, Flips], *, seed: int = 0) -> Verdict:
    """Judge several tasks: a pooled permutation test on their mean, and each by itself, corrected for their number.

    The pooled and the corrected tests each spend half of the 5 %.
    """
    adjusted = dict(zip(tasks, statistics.holm([each.p_worse for each in tasks.values()]), strict=True))
    pooled = permutation(list(tasks.values()), seed=seed)
    worse = tuple(name for name, p in adjusted.items() if p <= LEVEL / 2)
    ends = np.array([each.change_ci95 for each in tasks.values()])
    middle = float(ends.mean())
    half = math.sqrt(float(((ends[:, 1] - ends[:, 0]) ** 2).sum())) / 2 / len(ends)  # tasks are independent
    return Verdict(
        p_worse=pooled,
        p_by_task=adjusted,
        worse=worse,
        change=float(np.mean([each.change for each in tasks.values()])),
        change_ci95=(middle - half, middle + half),
        conclusion="worse" if worse or pooled <= LEVEL / 2 else "no measurable loss",
    )


def permutation(tasks: Sequence[Flips], *, seed: int = 0) -> float:
    """Return the one-sided p-value of the mean loss over tasks when baseline and candidate are swapped at random.

    Swapping the two models on an item matters only where they differ, so a permutation of a task with f flips is a
    draw of how many of them were losses: Bin(f, ½). Tasks weigh the same, whatever their number of items.
    """
    draw = np.random.default_rng(seed)
    observed = sum((task.lost - task.won) / task.items for task in tasks)
    total = np.zeros(REPETITIONS)
    for task in tasks:
        flips = task.lost + task.won
        total += (2 * draw.binomial(flips, 0.5, REPETITIONS) - flips) / task.items
    reached = int((total >= observed - 1e-12).sum())
    return (1 + reached) / (1 + REPETITIONS)


def length_ratio(baseline: Sequence[int], candidate: Sequence[int], *, seed: int = 0) -> tuple[float, Interval]:
    """Return mean output length of the candidate divided by the baseline's, in tokens, with its interval over items.

    MLPerf asks for at least 0.9: a damaged model that stops early looks fast.

    Raises:
        ValueError: Outputs of different items, or a baseline that wrote nothing.
    """
    before, after = np.array(baseline, np.float64), np.array(candidate, np.float64)
    if before.shape != after.shape or not before.sum() > 0:
        msg = f"output lengths can't be compared: {before.shape} and {after.shape}, {before.sum():g} tokens in all"
        raise ValueError(msg)
    ratio = float(after.sum() / before.sum())
    low, high = statistics.mean_interval(after - ratio * before, seed=seed)  # linearized ratio: its mean is zero
    return ratio, (ratio + low / float(before.mean()), ratio + high / float(before.mean()))
