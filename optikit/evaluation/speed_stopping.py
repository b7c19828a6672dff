"""Who is still to be timed, and for how many tokens: what is known already needs no further run.

The slowest arm, most often the untouched model, costs most and says least: its runs are alike. It is timed on its first
tokens only, as many as its scatter asks for, where its cache is shortest, which favors it. And its rounds end when its
ratio is known, though others go on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optikit.evaluation import looks
from optikit.evaluation.looks import SLOW, Look
from optikit.evaluation.speed import Trace
from optikit.evaluation.statistics import paired_ratio

TOKEN_ERROR = 0.02
"""Standard error of the time per token of a short answer, as a share: rounds differ by more than that."""
FEWEST_TOKENS = 9
"""Eight gaps and the first token."""


def answer_lengths(cold: Mapping[str, Trace], new_tokens: int, plain: Collection[str]) -> dict[str, int]:
    """Return how many tokens each arm is to write, from one answer of each.

    Args:
        cold: The first answer of every arm, of `new_tokens` tokens.
        new_tokens: Tokens that a whole answer has.
        plain: Arms that deliver one token at a time; the answers of others are never cut.
    """
    paces = {name: trace.tpot_ms for name, trace in cold.items()}
    slow = {name for name in plain if paces[name] >= SLOW * min(paces.values())}
    return {name: _length(trace, new_tokens) if name in slow else new_tokens for name, trace in cold.items()}


def _length(trace: Trace, new_tokens: int) -> int:
    """Return tokens enough for a mean gap with `TOKEN_ERROR`, by the quartiles of the answer's second half of gaps."""
    gaps = np.diff(trace.token_ns)[len(trace.token_ns) // 2 :]
    if not len(gaps):
        return new_tokens
    low, middle, high = map(float, np.quantile(gaps, [0.25, 0.5, 0.75]))
    scatter = (high - low) / 1.349 / max(middle, 1)  # a normal distribution's quartiles lie 1.349 deviations apart
    return min(new_tokens, max(FEWEST_TOKENS, 1 + math.ceil((scatter / TOKEN_ERROR) ** 2)))


@dataclass(frozen=True)
class Stopping:
    """When which arm has been timed enough.

    Attributes:
        pairs: Arms whose decode ratio is asked for, by name.
        looks: After how many rounds ratios are looked at; the last is the end.
        precision: How far the interval of a known ratio reaches, as a share of it.
    """

    pairs: tuple[tuple[str, str], ...]
    looks: tuple[Look, ...]
    precision: float
    seed: int = 0

    def unknown(self, traces: Mapping[str, Sequence[Trace]]) -> dict[tuple[str, str], str]:
        """Return the pairs whose ratio isn't known from traces by arm and round, and how far it is, in words."""
        found = {}
        for one, other in self.pairs:
            told = self._told(traces[one], traces[other])
            if told is not None:
                found[one, other] = told
        return found

    def _told(self, one: Sequence[Trace], other: Sequence[Trace]) -> str | None:
        """Return None if the ratio was known at a look so far."""
        rounds = min(len(one), len(other))
        told = ""
        for look in self.looks:
            if look.samples > rounds:
                break
            sides = [np.array([trace.tpot_ms for trace in side[: look.samples]]) for side in (one, other)]
            value, interval = paired_ratio(*sides, seed=self.seed, level=look.level)
            if looks.is_known(value, interval, self.precision):
                return None
            told = f"{value:.3g}× ({interval[0]:.3g} to {interval[1]:.3g})"
        return told
