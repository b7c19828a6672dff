"""Speed from timestamps of single tokens. Every definition is the one printed in the report.

    t0    the call, with token ids ready (tokenizing is not part of it)
    TTFT  t(first token) - t0
    TPOT  (t(last token) - t(first token)) / (tokens - 1)
    E2E   t(last token) - t0
    prefill tokens/s = prompt tokens / TTFT;  decode tokens/s = 1 / TPOT

Gaps between chunks are never used: a speculating decoder delivers several tokens at once, and the median gap of such a
stream means nothing. Output length is fixed, because a broken model that stops early looks fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from optikit.evaluation.results import Interval, Ratio
from optikit.evaluation.statistics import (
    LEVEL,
    Floats,
    median_interval,
    noise_floor,
    paired_ratio,
    requests_needed,
    speed_change,
)

NS_PER_MS = 1e6


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One request: when it was called and when each token was known, nanoseconds of one monotonic clock."""

    start_ns: int
    token_ns: tuple[int, ...]
    prompt_tokens: int

    def __post_init__(self) -> None:
        times = (self.start_ns, *self.token_ns)
        if len(self.token_ns) < 2:
            msg = f"a trace needs at least two tokens to have a time per token, got {len(self.token_ns)}"
            raise ValueError(msg)
        if any(later < earlier for earlier, later in pairwise(times)):
            msg = "timestamps go backwards"
            raise ValueError(msg)

    @property
    def ttft_ms(self) -> float:
        """Time to first token, ms."""
        return (self.token_ns[0] - self.start_ns) / NS_PER_MS

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token after the first, ms."""
        return (self.token_ns[-1] - self.token_ns[0]) / (len(self.token_ns) - 1) / NS_PER_MS

    @property
    def e2e_ms(self) -> float:
        """Time from the call to the last token, ms."""
        return (self.token_ns[-1] - self.start_ns) / NS_PER_MS


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Medians and tails of requests of equal length.

    Tails are None where too few requests were timed to claim them with 99 % confidence (MLPerf's early stopping).
    """

    requests: int
    ttft_ms_p50: float
    ttft_ms_p50_ci95: Interval
    ttft_ms_p95: float | None
    tpot_ms_p50: float
    tpot_ms_p50_ci95: Interval
    tpot_ms_p95: float | None
    e2e_ms_p50: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def summarize(traces: Sequence[Trace], *, seed: int = 0) -> Summary:
    """Summarize at least two requests.

    Raises:
        ValueError: Fewer than two requests, or requests of different prompt lengths: their TTFT can't be pooled.
    """
    lengths = {trace.prompt_tokens for trace in traces}
    if len(lengths) > 1:
        msg = f"requests with prompts of different lengths can't be pooled: {sorted(lengths)}"
        raise ValueError(msg)
    ttft = np.array([trace.ttft_ms for trace in traces])
    tpot = np.array([trace.tpot_ms for trace in traces])
    ttft_interval, tpot_interval = median_interval(ttft, seed=seed), median_interval(tpot, seed=seed)
    return Summary(
        requests=len(traces),
        ttft_ms_p50=float(np.median(ttft)),
        ttft_ms_p50_ci95=ttft_interval,
        ttft_ms_p95=tail(ttft, 0.95),
        tpot_ms_p50=float(np.median(tpot)),
        tpot_ms_p50_ci95=tpot_interval,
        tpot_ms_p95=tail(tpot, 0.95),
        e2e_ms_p50=float(np.median([trace.e2e_ms for trace in traces])),
        prefill_tokens_per_s=1000 * lengths.pop() / float(np.median(ttft)),
        decode_tokens_per_s=1000 / float(np.median(tpot)),
    )


def tail(values: Floats, percentile: float) -> float | None:
    """Return a tail percentile (linear interpolation), or None where `values` (n,) are too few to claim it."""
    return float(np.quantile(values, percentile)) if len(values) >= requests_needed(percentile) else None


def compare(
    baseline: Sequence[Trace],
    candidate: Sequence[Trace],
    *,
    noise: Mapping[str, Ratio] | None = None,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Ratio]:
    """Compare paired requests: `decode` by TPOT, `prefill` by TTFT; above one, the candidate is faster.

    Pairs are of one round; of the side that has more rounds, those that the other doesn't have are left out.

    `noise` is this comparison of the baseline with itself; None makes it: its own interval is its noise floor.
    """
    pairs = list(zip(baseline, candidate, strict=False))
    sides = {"decode": [each.tpot_ms for each, _ in pairs], "prefill": [each.ttft_ms for each, _ in pairs]}
    other = {"decode": [each.tpot_ms for _, each in pairs], "prefill": [each.ttft_ms for _, each in pairs]}
    found = {}
    for what, times in sides.items():
        value, interval = paired_ratio(np.array(times), np.array(other[what]), seed=seed, level=level)
        floor = noise_floor(interval) if noise is None else noise[what].noise_floor
        verdict = speed_change(value, interval, floor)
        found[what] = Ratio(value=value, ci95=interval, noise_floor=floor, verdict=verdict)
    return found
