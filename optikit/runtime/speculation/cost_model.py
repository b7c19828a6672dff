"""Measured costs of speculation: a forward of m tokens, and asking heads or a draft model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optikit.runtime.decoder import Decoder, SinglePath, Tokens
from optikit.runtime.speculation.decoding_loop import Step
from optikit.runtime.speculation.speculator import ChoosingDecoder, Speculator

if TYPE_CHECKING:
    from optikit.runtime.speculation.eagle_session import EagleSession

WINDOWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32)
"""Window lengths m at which T(m) is measured; between them it is interpolated."""


@dataclass(frozen=True)
class WindowCosts:
    """T(m): milliseconds of a forward of m tokens.

    Attributes:
        ms: Measured times by window length; has 1.
    """

    ms: Mapping[int, float]

    def at(self, m: int) -> float:
        """Return T(m): measured, interpolated, or beyond the longest window continued along the last slope.

        >>> costs = WindowCosts({1: 4.0, 3: 6.0, 5: 7.0})
        >>> [costs.at(m) for m in (1, 2, 3, 7)]
        [4.0, 5.0, 6.0, 8.0]
        """
        lengths = sorted(self.ms)
        if m > lengths[-1] and len(lengths) > 1:
            before, last = lengths[-2:]
            return self.ms[last] + (m - last) * (self.ms[last] - self.ms[before]) / (last - before)
        return float(np.interp(m, lengths, [self.ms[each] for each in lengths]))


def measure_windows(
    decoder: Decoder,
    context: Tokens,
    *,
    windows: Sequence[int] = WINDOWS,
    rounds: int = 15,
    observe: Callable[[int, int], None] = lambda _done, _total: None,
) -> WindowCosts:
    """Measure T(m) behind a context, in rounds of all windows there and back, and take the medians.

    Args:
        decoder: The target.
        context: (n,): what the cache holds meanwhile.
        windows: Lengths to measure; those that don't fit behind the context are left out.
        rounds: Times that each length is measured; two more of each warm up.
        observe: Told (done, total) rounds.
    """
    room = decoder.max_tokens - len(context)
    lengths = sorted({1, *(m for m in windows if m <= room)})
    taken: dict[int, list[float]] = {m: [] for m in lengths}
    decoder.forward(context, 0, 1)
    for number in range(rounds + 2):
        observe(number, rounds + 2)
        for m in lengths if number % 2 else reversed(lengths):
            tokens = np.resize(context, m)
            start = time.perf_counter()
            decoder.forward(tokens, len(context))
            taken[m].append((time.perf_counter() - start) * 1000)
    observe(rounds + 2, rounds + 2)
    return WindowCosts({m: float(np.median(times[2:])) for m, times in taken.items()})


def measure_singles(decoder: ChoosingDecoder, context: Tokens, *, rounds: int = 25) -> dict[SinglePath, float]:
    """Measure a forward of one token behind a context (n,) by either path, in turns; milliseconds, medians.

    The decoder is left with its own path for a token alone.
    """
    taken: dict[SinglePath, list[float]] = {"own": [], "verify": []}
    decoder.forward(context, 0, 1)
    for number in range(rounds + 2):
        for path in taken if number % 2 else reversed(taken):
            decoder.single(path)
            decoder.forward(context[-1:], len(context))  # the first one after another path finds its caches cold
            start = time.perf_counter()
            decoder.forward(context[-1:], len(context))
            taken[path].append((time.perf_counter() - start) * 1000)
    decoder.single("own")
    return {path: float(np.median(times[2:])) for path, times in taken.items()}


@dataclass(frozen=True, kw_only=True)
class DraftCosts:
    """What it costs to ask heads or a draft model; a lookup is free.

    Attributes:
        name: The drafter; "" charges every step.
        ask_ms: Time of asking once, whatever is drafted.
        per_token_ms: Time of each token that it drafts.
    """

    name: str = ""
    ask_ms: float = 0.0
    per_token_ms: float = 0.0

    def of(self, step: Step) -> float:
        """Return the drafting time of a step: asked in vain costs, too; where another drafter answered, nothing."""
        if self.name and step.by not in ("", self.name):
            return 0.0
        return self.ask_ms + self.per_token_ms * step.drafted


FREE = DraftCosts()


def measure_drafting(speculator: Speculator, context: Tokens, *, rounds: int = 30) -> DraftCosts:
    """Measure what asking the speculator's heads or draft model costs, behind a context (n,)."""
    if speculator.heads is not None:
        heads, state, newest = speculator.heads, np.ones(speculator.heads.width, np.float32), int(context[-1])
        return DraftCosts(name=speculator.method, ask_ms=_median_ms(lambda: heads(state, newest), rounds))
    if speculator.eagle is not None:
        return _eagle_costs(speculator.eagle, context, rounds)
    if speculator.draft is not None:
        draft, token = speculator.draft, context[-1:]
        draft.forward(context, 0, 1)
        each = _median_ms(lambda: draft.forward(token, len(context), 1), rounds)
        # Asked once: the run that finds it too unsure, or that takes in the last token of a draft that was all right.
        return DraftCosts(name=speculator.method, ask_ms=each, per_token_ms=each)
    return FREE


def _eagle_costs(eagle: EagleSession, context: Tokens, rounds: int) -> DraftCosts:
    """Measure taking in two rows behind a context, as after a step that kept a draft token, and going on from there."""
    width = len(eagle.layers) * eagle.width
    eagle.begin()
    eagle.read(context, np.ones((len(context), width), np.float32))
    two, features = np.resize(context, 2), np.ones((2, width), np.float32)
    rounds = min(rounds, (eagle.max_tokens - len(context)) // 4)
    ask = _median_ms(lambda: eagle.read(two, features), rounds)
    token = int(context[-1])
    each = _median_ms(lambda: eagle.ahead(token), rounds)
    return DraftCosts(name="eagle3", ask_ms=ask, per_token_ms=each)


def _median_ms(call: Callable[[], object], rounds: int) -> float:
    """Return the median time of a call; a fifth more of them warm up."""
    taken = []
    for _ in range(rounds + rounds // 5):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1000)
    return float(np.median(taken[rounds // 5 :]))
