"""What a load test found: the schema of bench.json, and the figures of a level from its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict

from optikit.described import Described
from optikit.evaluation import statistics
from optikit.evaluation.cost import Hour
from optikit.evaluation.latency_limits import Limits
from optikit.evaluation.results import Interval, Kind, LoadRow
from optikit.evaluation.speed import tail
from optikit.runtime.completions_client import Streamed


class _Frozen(Described):
    model_config = ConfigDict(allow_inf_nan=False)


class Variant(_Frozen):
    """One of the servers that were compared."""

    name: str
    url: str
    model: str
    started_here: bool
    """Whether it was started for this, on this machine."""


class Identity(_Frozen):
    """How far a variant's greedy answers are those of another one before it."""

    variant: str
    against: str = ""
    """Empty in results of versions that compared with the first one only."""
    prompts: int
    first_token: int
    whole: int


class Sample(_Frozen):
    """One request."""

    variant: str
    kind: Kind
    load: float
    prompt: int
    """Number of the prompt, from 0."""
    due_s: float
    """When it was due, from the beginning of its level."""
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    text: str = ""
    error: str = ""


class Bench(_Frozen):
    """All that a load test found, but for its samples."""

    schema_version: Literal[1] = 1
    variants: tuple[Variant, ...]
    rows: tuple[LoadRow, ...]
    identity: tuple[Identity, ...]
    limits: Limits
    usd_per_hour: float | None
    """List price of the machine that serves."""
    discount: float = 0.0
    """Share that was taken off it."""
    seed: int
    new_tokens: int
    prompts: int
    end_of_text_ignored: bool
    host: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    created: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What became of one request: an answer, or why there is none.

    Attributes:
        prompt: Number of the prompt.
        due_ns: When it was due, by `time.perf_counter_ns`; a client that comes late to it has kept someone waiting.
        streamed: The answer.
        error: Why there is none.
    """

    prompt: int
    due_ns: int
    streamed: Streamed | None = None
    error: str = ""

    @property
    def ttft_ms(self) -> float | None:
        """Time from when it was due to the first piece, ms."""
        return None if self.streamed is None else (self.streamed.piece_ns[0] - self.due_ns) / 1e6

    @property
    def e2e_ms(self) -> float | None:
        """Time from when it was due to the last piece, ms."""
        return None if self.streamed is None else (self.streamed.piece_ns[-1] - self.due_ns) / 1e6

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first piece, ms."""
        return None if self.streamed is None else self.streamed.tpot_ms

    def keeps(self, limits: Limits) -> bool:
        """Tell whether it stayed within every limit."""
        pairs = ((self.ttft_ms, limits.ttft_ms), (self.tpot_ms, limits.tpot_ms), (self.e2e_ms, limits.e2e_ms))
        return all(value is not None and (most is None or value <= most) for value, most in pairs)


class Level(NamedTuple):
    """A variant under one load."""

    variant: str
    kind: Kind
    load: float


def row(level: Level, replies: Sequence[Reply], limits: Limits, *, hour: Hour | None) -> LoadRow:
    """Return the figures of one level.

    Args:
        level: Whose, under which load.
        replies: Of all requests, at least one.
        limits: What a good one keeps.
        hour: Price of the machine; None where it isn't known.
    """
    came = [each.streamed for each in replies if each.streamed is not None]
    begun = min(each.due_ns for each in replies)
    seconds = max(1e-9, (max((each.piece_ns[-1] for each in came), default=begun) - begun) / 1e9)
    per_second = sum(each.tokens for each in came) / seconds
    ttft, tpot, e2e = (_middle(replies, name) for name in ("ttft_ms", "tpot_ms", "e2e_ms"))
    return LoadRow(
        **level._asdict(),
        requests=len(replies),
        errors=len(replies) - len(came),
        ttft_ms_p50=ttft[0],
        ttft_ms_p50_ci95=ttft[1],
        ttft_ms_p95=ttft[2],
        tpot_ms_p50=tpot[0],
        tpot_ms_p50_ci95=tpot[1],
        tpot_ms_p95=tpot[2],
        e2e_ms_p50=e2e[0],
        e2e_ms_p95=e2e[2],
        e2e_ms_mean=_mean_e2e(replies),
        output_tokens_per_s=per_second,
        requests_per_s=len(came) / seconds,
        **_goodput(replies, limits, seconds),
        usd_per_million_output_tokens=hour.output(per_second) if hour and per_second else None,
        usd_per_million_blended_tokens=_blended(hour, level, tpot[0]),
        reason="; ".join(_missing(level, replies, limits, hour)),
    )


def _goodput(replies: Sequence[Reply], limits: Limits, seconds: float) -> dict[str, float | None]:
    """Return which share of requests kept every limit, and how many did per second; nothing without limits."""
    if not limits.any:
        return {"good_share": None, "goodput_per_s": None}
    good = sum(each.keeps(limits) for each in replies)
    return {"good_share": good / len(replies), "goodput_per_s": good / seconds}


def _mean_e2e(replies: Sequence[Reply]) -> float | None:
    found = [each.e2e_ms for each in replies if each.e2e_ms is not None]
    return sum(found) / len(found) if found else None


def _missing(level: Level, replies: Sequence[Reply], limits: Limits, hour: Hour | None) -> Iterator[str]:
    """Yield why figures of a level are null."""
    came = sum(each.streamed is not None for each in replies)
    if not came:
        yield f"times: all {len(replies)} requests failed"
    elif came < statistics.requests_needed(0.95):
        yield f"95th percentiles: {came} answers are too few, {statistics.requests_needed(0.95)} are needed"
    if not limits.any:
        yield "goodput: no limits were given"
    if hour is None:
        yield "price: what the machine costs wasn't said"
    elif level.kind == "rate":
        yield "blended price: it is that of a fixed number of requests at a time"


def _middle(replies: Sequence[Reply], name: str) -> tuple[float | None, Interval | None, float | None]:
    """Return median, its interval and the 95th percentile of a time, as far as there are enough answers."""
    array = np.array([getattr(each, name) for each in replies if each.streamed is not None], np.float64)
    if not len(array):
        return None, None, None
    interval = statistics.median_interval(array) if len(array) > 1 else None
    return float(np.median(array)), interval, tail(array, 0.95)


def _blended(hour: Hour | None, level: Level, tpot_ms: float | None) -> float | None:
    """Return the blended price; only a closed loop has a number of requests at a time."""
    if hour is None or level.kind == "rate" or not tpot_ms:
        return None
    return hour.blended(tpot_ms=tpot_ms, concurrency=int(level.load))


def sample(level: Level, reply: Reply, begun_ns: int) -> Sample:
    """Return a request as it is kept.

    Args:
        level: Its level.
        reply: What became of it.
        begun_ns: When its level began.
    """
    came = reply.streamed
    return Sample(
        **level._asdict(),
        prompt=reply.prompt,
        due_s=(reply.due_ns - begun_ns) / 1e9,
        ttft_ms=reply.ttft_ms,
        tpot_ms=reply.tpot_ms,
        e2e_ms=reply.e2e_ms,
        prompt_tokens=came.prompt_tokens if came else None,
        output_tokens=came.tokens if came else None,
        text=came.text if came else "",
        error=reply.error,
    )


Answered = tuple[str, Sequence[Reply]]
"""A variant and what became of its requests."""


def identities(found: Sequence[Answered]) -> Iterator[Identity]:
    """Compare each variant's answers with those of each before it, prompt by prompt."""
    for number, each in enumerate(found):
        for before in found[:number]:
            yield identity(before, each)


def identity(before: Answered, after: Answered) -> Identity:
    """Compare the answers of two variants, prompt by prompt: tokens where both tell them."""
    (against, first), (variant, replies) = before, after
    theirs = {each.prompt: each.streamed for each in first if each.streamed is not None}
    prompts = {each.prompt: each.streamed for each in replies if each.streamed is not None}
    shared = [(theirs[number], came) for number, came in prompts.items() if number in theirs]
    return Identity(
        variant=variant,
        against=against,
        prompts=len(shared),
        first_token=sum(_written(one)[:1] == _written(other)[:1] for one, other in map(_alike, shared)),
        whole=sum(_written(one) == _written(other) for one, other in map(_alike, shared)),
    )


def _alike(pair: tuple[Streamed, Streamed]) -> tuple[Streamed, Streamed]:
    """Return a pair whose answers are both tokens or both text."""
    one, other = pair
    if one.token_ids and other.token_ids:
        return pair
    return replace(one, token_ids=()), replace(other, token_ids=())


def _written(came: Streamed) -> Sequence[int] | str:
    return came.token_ids or came.text
