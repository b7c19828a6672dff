"""What clients of a server see: prompts one after another, several at a time in a closed loop, or at random times.

Each client sends its next prompt when its last is answered. Lengths are fixed where the server lets one ask for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optikit import records
from optikit.errors import InputMissingError, StageTimeoutError, UnavailableError, UsageError
from optikit.evaluation.bench_results import Level, Reply
from optikit.evaluation.results import Served, ServedSpeed
from optikit.runtime.completions_client import Client, Prompt, RefusedByServerError, Streamed

if TYPE_CHECKING:
    from optikit.evaluation.results import Interval

WITHOUT_END: tuple[Mapping[str, Any], ...] = (
    {"ignore_eos": True, "stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True}},
    {},
)
"""Parameters that servers beyond OpenAI's own know, tried in this order."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much to ask: tokens per answer, requests at a time, and requests for each of those."""

    new_tokens: int
    concurrency: tuple[int, ...]
    requests: int


def time_server(
    client: Client,
    model: str,
    prompts: Sequence[Prompt],
    load: Load,
    note: Callable[[str], None],
    more: Mapping[str, Any] | None = None,
) -> Served:
    """Time a server.

    Args:
        client: The server.
        model: Which of its models.
        prompts: Used in turn.
        load: How much to ask.
        note: Told about each number of requests at a time.
        more: Further parameters of every request.

    Raises:
        UnavailableError: It drops connections, or answers with an error.
        StageTimeoutError: It hangs.
    """
    extra = {**accepted(client, model, prompts[0], load.new_tokens, more or {}), **(more or {})}
    rows, counted = [], True
    for level in load.concurrency:
        note(f"{level} at a time: {load.requests} requests")
        asked = [prompts[index % len(prompts)] for index in range(max(load.requests, 2 * level))]
        begun = time.perf_counter_ns()
        with ThreadPoolExecutor(max_workers=level) as clients:
            waiting = [clients.submit(client.stream, model, prompt, load.new_tokens, extra=extra) for prompt in asked]
            try:
                answers = [each.result() for each in waiting]
            except BaseException:
                clients.shutdown(cancel_futures=True)
                raise
        counted = counted and all(each.output_tokens is not None for each in answers)
        rows.append(_row(level, answers, begun))
    by: Literal["the server", "chunks of its stream"] = "the server" if counted else "chunks of its stream"
    return Served(
        url=client.url,
        model=model,
        speed=tuple(rows),
        tokens_counted_by=by,
        end_of_text_ignored="ignore_eos" in extra,
    )


def accepted(client: Client, model: str, prompt: Prompt, new_tokens: int, more: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return which of `WITHOUT_END` a server takes; the request that finds out also warms it up.

    Args:
        client: The server.
        model: Which of its models.
        prompt: One to try.
        new_tokens: Tokens to write.
        more: Further parameters of every request.

    Raises:
        UnavailableError: It takes none of them, drops connections, or answers with an error.
        StageTimeoutError: It hangs.
    """
    for extra in WITHOUT_END[:-1]:
        try:
            client.stream(model, prompt, new_tokens, extra={**extra, **more})
        except RefusedByServerError:
            continue
        return extra
    client.stream(model, prompt, new_tokens, extra={**WITHOUT_END[-1], **more})
    return WITHOUT_END[-1]


def _row(level: int, answers: Sequence[Streamed], begun: int) -> ServedSpeed:
    import numpy as np

    from optikit.evaluation import speed, statistics

    def middle(values: Sequence[float]) -> tuple[float, Interval, float | None]:
        array = np.array(values, np.float64)
        return float(np.median(array)), statistics.median_interval(array), speed.tail(array, 0.95)

    ttft, tpot, e2e = (middle([getattr(each, name) for each in answers]) for name in ("ttft_ms", "tpot_ms", "e2e_ms"))
    wall_s = (max(each.piece_ns[-1] for each in answers) - begun) / 1e9
    prompted = [each.prompt_tokens for each in answers if each.prompt_tokens is not None]
    return ServedSpeed(
        concurrency=level,
        requests=len(answers),
        prompt_tokens_p50=float(np.median(prompted)) if prompted else None,
        output_tokens_p50=float(np.median([each.tokens for each in answers])),
        ttft_ms_p50=ttft[0],
        ttft_ms_p50_ci95=ttft[1],
        ttft_ms_p95=ttft[2],
        tpot_ms_p50=tpot[0],
        tpot_ms_p50_ci95=tpot[1],
        tpot_ms_p95=tpot[2],
        e2e_ms_p50=e2e[0],
        e2e_ms_p95=e2e[2],
        output_tokens_per_s=sum(each.tokens for each in answers) / wall_s,
        requests_per_s=len(answers) / wall_s,
    )


Send = Callable[[int], Streamed]
"""From the number of a prompt to its answer."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt, and how many tokens its answer gets."""

    prompt: Prompt
    new_tokens: int


def read_prompts(path: Path, new_tokens: int) -> list[Asked]:
    """Read prompts, each with the length of its answer: JSON Lines of {prompt, max_tokens}, or lines of text.

    Args:
        path: Where they are.
        new_tokens: Of an answer whose prompt doesn't say.

    Raises:
        InputMissingError: There are none.
        UsageError: A record has no prompt, or asks for less than two tokens.
    """
    text = records.read(path)
    found = []
    for number, entry in records.parse(text, path):
        said = entry if isinstance(entry, dict) else {}
        prompt, tokens = said.get("prompt"), said.get("max_tokens", new_tokens)
        if not isinstance(prompt, str) or not prompt or type(tokens) is not int or tokens < 2:
            message = f"{path}: record {number} has no `prompt`, or a `max_tokens` below 2"
            raise UsageError(message, fix='write {"prompt": "…"} or {"prompt": "…", "max_tokens": 64}')
        found.append(Asked(prompt=prompt, new_tokens=tokens))
    found = found or [Asked(prompt=line, new_tokens=new_tokens) for _, line in records.lines(text)]
    if not found:
        raise InputMissingError(f"{path} holds no prompts", fix='write {"prompt": "…"} per line')
    return found


def levels(variant: str, clients: Sequence[int], rates: Sequence[float]) -> list[Level]:
    """Return the loads of one variant, closed loops first."""
    closed = [Level(variant, "clients", float(each)) for each in clients]
    return closed + [Level(variant, "rate", each) for each in rates]


def run(send: Send, level: Level, prompts: int, *, requests: int, seed: int) -> list[Reply]:
    """Put a server under one load.

    Args:
        send: Asks it.
        level: The load.
        prompts: How many prompts there are, asked in turn.
        requests: At least so many requests.
        seed: Of the times of an open loop.

    Raises:
        UnavailableError: It answered nothing.
    """
    count = max(requests, 2 * int(level.load) if level.kind == "clients" else 2)
    numbers = [i % prompts for i in range(count)]
    if level.kind == "clients":
        replies = closed_loop(send, numbers, int(level.load))
    else:
        replies = open_loop(send, numbers, level.load, seed)
    if all(each.streamed is None for each in replies):
        raise UnavailableError(f"{level.variant} answered nothing: {replies[0].error}", fix="see its log")
    return replies


@dataclass(frozen=True, kw_only=True)
class Loading:
    """A server that is warm, and what is asked of it."""

    client: Client
    model: str
    asked: Sequence[Asked]
    extra: Mapping[str, Any]

    def send(self, number: int) -> Streamed:
        """Return the answer to a prompt."""
        one = self.asked[number]
        return self.client.stream(self.model, one.prompt, one.new_tokens, extra=self.extra)


WARM = 2
"""Requests before any is counted, beside the one that asks which parameters a server takes."""


def warmed(client: Client, model: str, asked: Sequence[Asked], more: Mapping[str, Any]) -> Loading:
    """Return a server that has answered, and is asked in the words that it takes.

    Args:
        client: The server.
        model: Which of its models.
        asked: What it will be asked.
        more: Further parameters of every request.

    Raises:
        UnavailableError: It takes none of the parameters, drops connections, or answers with an error.
        StageTimeoutError: It hangs.
    """
    first = asked[0]
    extra = {**accepted(client, model, first.prompt, first.new_tokens, more), **more}
    found = Loading(client=client, model=model, asked=asked, extra=extra)
    for _ in range(WARM):
        found.send(0)
    return found


def closed_loop(send: Send, prompts: Sequence[int], clients: int) -> list[Reply]:
    """Let clients ask, each its next prompt when its last is answered.

    Args:
        send: Asks.
        prompts: Numbers of prompts.
        clients: How many.
    """
    with ThreadPoolExecutor(max_workers=clients) as pool:
        return list(pool.map(lambda number: _reply(send, number, time.perf_counter_ns()), prompts))


def open_loop(send: Send, prompts: Sequence[int], rate: float, seed: int) -> list[Reply]:
    """Ask at random times, whether the last answers came or not: a Poisson process, as of people who are strangers.

    Times count from when a request was due, so that a server that falls behind can't hide it.

    Args:
        send: Asks.
        prompts: Numbers of prompts.
        rate: Requests per second, on average.
        seed: Of the times.
    """
    import numpy as np

    gaps = np.random.default_rng(seed).exponential(1 / rate, len(prompts))
    begun = time.perf_counter_ns() + 10_000_000
    due = (begun + np.cumsum(gaps) * 1e9).astype(np.int64).tolist()
    with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
        waiting = []
        for number, at in zip(prompts, due, strict=True):
            time.sleep(max(0.0, (at - time.perf_counter_ns()) / 1e9))
            waiting.append(pool.submit(_reply, send, number, at))
        return [each.result() for each in waiting]


def _reply(send: Send, number: int, due_ns: int) -> Reply:
    try:
        return Reply(prompt=number, due_ns=due_ns, streamed=send(number))
    except (UnavailableError, StageTimeoutError) as error:
        return Reply(prompt=number, due_ns=due_ns, error=error.message)
