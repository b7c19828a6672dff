"""When measuring may end early: at looks that are fixed beforehand and share the error of one test among them.

A test that is ended as soon as it looks good is wrong more often than it says. Here the looks are fixed before the
first sample, and the intervals taken at them miss with probabilities that sum to `ALPHA`. So all of them hold at once
with 95 %, and one may stop at any look, for whatever reason: a group-sequential design whose error is spent by
Bonferroni's inequality, which asks nothing of how the looks depend on each other (Jennison and Turnbull 2000, Group
Sequential Methods, chapter 7, spends it more tightly).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from optikit.evaluation.results import Interval

ALPHA = 0.05
"""Probability that any interval of a design misses."""
FIRST = 3
"""Samples at the first look: two say nothing of how they scatter."""
GROWTH = 1.4
"""From look to look; looks at every sample would share the error among too many."""
SPENT_LAST = 2 / 3
"""Share of the error that is kept for the last look: who goes to the end pays little for having looked before."""

SLOW = 2.0
"""Times the fastest arm's time per token, from which on an arm's answers are cut short."""


class Look(NamedTuple):
    """Number of samples at which an interval is taken, and its level of confidence."""

    samples: int
    level: float


def design(most: int) -> tuple[Look, ...]:
    """Return the looks of a test of at most so many samples; the last is there.

    >>> [(look.samples, round(look.level, 4)) for look in design(6)]
    [(3, 0.9917), (4, 0.9917), (6, 0.9667)]
    """
    early: list[int] = []
    at = FIRST
    while at < most:
        early.append(at)
        at = max(at + 1, math.floor(at * GROWTH))
    if not early:
        return only(most)
    each = (1 - SPENT_LAST) * ALPHA / len(early)
    return (*(Look(samples, 1 - each) for samples in early), Look(most, 1 - SPENT_LAST * ALPHA))


def only(samples: int) -> tuple[Look, ...]:
    """Return the design of a test that goes to its end."""
    return (Look(samples, 1 - ALPHA),)


def level(looks: Sequence[Look], samples: int) -> float:
    """Return the level of the look at so many samples."""
    return next((look.level for look in looks if look.samples == samples), 1 - ALPHA)


def is_known(value: float, interval: Interval, precision: float) -> bool:
    """Tell whether a ratio is known: its interval reaches no farther than the precision, and not across one.

    >>> is_known(5.0, (4.8, 5.2), 0.1), is_known(5.0, (4.0, 6.2), 0.1), is_known(1.01, (0.98, 1.04), 0.1)
    (True, False, False)
    """
    low, high = interval
    across = low <= 1 <= high
    return not across and high <= value * (1 + precision) and low >= value / (1 + precision)
