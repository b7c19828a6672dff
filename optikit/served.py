"""`optikit eval URL` as one function: a server that speaks OpenAI's completions API, measured from outside.

Speed: prompts one after another, then 2, 4, 8 at a time: each client sends its next prompt when its last is answered
(closed loop). Quality: perplexity of a text, cut by characters, where the server echoes log-probabilities.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optikit import __version__, gates, host, terminal
from optikit.errors import InputMissingError, UsageError
from optikit.recipe.schema import Evaluate, Gate, Text
from optikit.report.schema import Measurement, Perplexity, Quality, Report, Served, ServedSpeed
from optikit.runtime.completions import Client, RefusedByServerError, Streamed
from optikit.store.sources import resolve_text
from optikit.store.store import Store

if TYPE_CHECKING:
    from optikit.report.schema import Interval

CHARACTERS_PER_TOKEN = 4
"""What a prompt of so many tokens is cut to: only the server knows its tokens."""
WITHOUT_END: tuple[Mapping[str, Any], ...] = (
    {"ignore_eos": True, "stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True}},
    {},
)
"""Parameters that servers beyond OpenAI's own know, tried in this order."""
NEEDS_LOGPROBS = "the server doesn't echo the log-probabilities of a prompt"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    url: str
    out: Path
    wanted: Evaluate
    gates: Mapping[str, Gate] = field(default_factory=dict)
    base: Path = Path()
    concurrency: tuple[int, ...] = (1, 2, 4, 8)
    requests: int = 16
    timeout_s: float = 60
    model: str | None = None
    key_from: str | None = None
    offline: bool = False
    progress: str = "auto"


def measure(request: Request) -> Report:
    """Measure a server and write the report to `request.out`.

    Raises:
        UsageError: Neither prompts nor a text were given, a protocol that counts tokens, or no key in its variable.
        UnavailableError: The server can't be reached, drops connections, or answers with an error.
        StageTimeoutError: It hangs.
    """
    from optikit.report import summary, write

    started = time.monotonic()
    client = Client(request.url, timeout_s=request.timeout_s, key=_key(request.key_from))
    texts = _texts(request)
    with terminal.make(request.progress) as progress:
        model = request.model or client.models()[0]
        progress.note(f"measuring {model} at {request.url}")
        served, quality = None, None
        if "prompts" in texts:
            served = _speed(client, model, _prompts(texts["prompts"], request.wanted), request, progress.note)
        if "perplexity" in texts:
            quality = _quality(client, model, texts["perplexity"], request.wanted, progress.note)
    report = _report(request, client.url, model, served, quality, seconds=time.monotonic() - started)
    write.write(report, request.out)
    if request.progress != "none":
        summary.show(report, request.out)
    return report


def _key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise UsageError(f"--key-from {variable}: that variable is not set", fix=f"export {variable}=…")
    return key


def _texts(request: Request) -> dict[str, Path]:
    """Return the files of prompts and of running text."""
    wanted = request.wanted
    named: dict[str, Text] = {}
    if wanted.perplexity is not None:
        if wanted.perplexity.protocol != "windows":
            message = f"perplexity protocol {wanted.perplexity.protocol} counts tokens, and a server keeps its own"
            raise UsageError(message, fix="use protocol windows, which is cut by characters for a server")
        named["perplexity"] = wanted.perplexity
    if wanted.speed is not None and wanted.speed.prompts:
        named["prompts"] = Text(text=wanted.speed.prompts)
    elif wanted.speed is not None and wanted.perplexity is not None:
        named["prompts"] = wanted.perplexity
    if not named:
        raise UsageError("nothing to ask the server", fix="give --prompts or --text")
    store = Store.default()
    return {
        role: resolve_text(text, store, base=request.base, offline=request.offline, note=lambda _: None).path
        for role, text in named.items()
    }


def _prompts(path: Path, wanted: Evaluate) -> list[str]:
    """Return prompts of about the wanted number of tokens: of JSON Lines as they are, of prose cut by characters."""
    from optikit.stages.measure import _text

    text = _text.read(path)
    found = list(_text.prompt_fields(path, text))
    if found:
        return found
    length = CHARACTERS_PER_TOKEN * (wanted.speed.prompt_tokens if wanted.speed else 128)
    return [piece for start in range(0, len(text), length) if (piece := text[start : start + length].strip())]


def _speed(client: Client, model: str, prompts: Sequence[str], request: Request, note: Callable[[str], None]) -> Served:
    speed = request.wanted.speed
    new_tokens = speed.new_tokens if speed else 64
    extra = _accepted(client, model, prompts[0], new_tokens)
    rows, counted = [], True
    for level in request.concurrency:
        note(f"{level} at a time: {request.requests} requests")
        asked = [prompts[index % len(prompts)] for index in range(max(request.requests, 2 * level))]
        begun = time.perf_counter_ns()
        with ThreadPoolExecutor(max_workers=level) as clients:
            waiting = [clients.submit(client.stream, model, prompt, new_tokens, extra=extra) for prompt in asked]
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


def _accepted(client: Client, model: str, prompt: str, new_tokens: int) -> Mapping[str, Any]:
    """Return the parameters that the server takes; the request that finds out also warms it up."""
    for extra in WITHOUT_END[:-1]:
        try:
            client.stream(model, prompt, new_tokens, extra=extra)
        except RefusedByServerError:
            continue
        return extra
    client.stream(model, prompt, new_tokens, extra=WITHOUT_END[-1])
    return WITHOUT_END[-1]


def _row(level: int, answers: Sequence[Streamed], begun: int) -> ServedSpeed:
    import numpy as np

    from optikit.metrics import speed, statistics

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


def _quality(client: Client, model: str, path: Path, wanted: Evaluate, note: Callable[[str], None]) -> Quality:
    """Return the perplexity of windows of text, cut by characters, as the server's own tokens have it."""
    import hashlib
    import math

    from optikit.stages.measure import _text

    options = wanted.perplexity
    assert options is not None  # noqa: S101 - the caller has looked
    assert options.windows is not None  # noqa: S101 - `_texts` has looked
    text = _text.read(path)
    length = CHARACTERS_PER_TOKEN * options.window
    windows = [text[start : start + length] for start in range(0, length * options.windows, length)]
    if len(windows[-1]) < length:
        message = f"{path} has {len(text)} characters, {length * options.windows} are needed"
        raise InputMissingError(message, fix="give a longer text, or a shorter window")
    found: list[float] = []
    scored = 0
    for index, window in enumerate(windows):
        note(f"perplexity: window {index + 1} of {len(windows)}")
        values = client.prompt_logprobs(model, window)
        if values is None:
            return Quality(runtime="server", reason=NEEDS_LOGPROBS)
        found += values.logprobs
        scored += values.scored_bytes
    mean = -sum(found) / len(found)
    if not math.isfinite(mean):
        return Quality(runtime="server", reason="the server's log-probabilities are not finite numbers")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    protocol = f"text-{digest}@{length}chars×{options.windows}"
    perplexity = Perplexity(
        protocol=protocol,
        value=math.exp(min(mean, 700.0)),
        tokens=len(found),
        bits_per_byte=mean * len(found) / math.log(2) / scored,
    )
    return Quality(runtime="server", perplexity=perplexity)


def _report(
    request: Request, url: str, model: str, served: Served | None, quality: Quality | None, *, seconds: float
) -> Report:
    found = Measurement(size_bytes=None, quality=quality, reason="size and memory: a server doesn't tell them")
    judged = gates.judge(request.gates, _values(served))
    return Report(
        verdict=gates.overall(judged),
        recipe={
            "model": url,
            "evaluate": request.wanted.model_dump(mode="json"),
            "gates": {name: gate.model_dump(mode="json") for name, gate in request.gates.items()},
        },
        model={"name": model, "source": url},
        target={},
        host=host.describe(),
        versions={"optikit": __version__, "python": platform.python_version()},
        baseline=found,
        result=found,
        steps=(),
        served=served,
        gates=judged,
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["optikit", *(url if each == request.url else each for each in sys.argv[1:])]),
    )


def _values(served: Served | None) -> dict[str, gates.Value]:
    """Return what gates may limit: what one client alone sees."""
    alone = next((row for row in served.speed if row.concurrency == 1), None) if served else None
    if alone is None:
        return {}
    return {
        "ttft_ms_p50": gates.Value(value=alone.ttft_ms_p50, ci95=alone.ttft_ms_p50_ci95),
        "tpot_ms_p50": gates.Value(value=alone.tpot_ms_p50, ci95=alone.tpot_ms_p50_ci95),
    }
