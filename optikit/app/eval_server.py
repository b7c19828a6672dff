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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from optikit import __version__, host, records, targets
from optikit.app.output_dir import require_no_seal
from optikit.errors import InputMissingError, UsageError
from optikit.evaluation.cost import Hour
from optikit.evaluation.load_test import Load, time_server
from optikit.evaluation.results import Cost, Measurement, Perplexity, Quality, Report, Served
from optikit.plan import check_gates, price
from optikit.progress import make as make_progress
from optikit.recipe.schema import Evaluate, Gate, Price, Text
from optikit.report import judge, pricing
from optikit.runtime.completions_client import Client
from optikit.store.sources import resolve_text
from optikit.store.store import Store

CHARACTERS_PER_TOKEN = 4
"""What a prompt of so many tokens is cut to: only the server knows its tokens."""
UNPRICED = "what its machine costs wasn't said: give --usd-per-hour or --instance"
NEEDS_LOGPROBS = "the server doesn't echo the log-probabilities of a prompt"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    url: str
    out: Path
    wanted: Evaluate
    gates: Mapping[str, Gate] = field(default_factory=dict)
    cost: Price = field(default_factory=Price)
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
    require_no_seal(request.out)
    _hour(request.cost)  # a wrong name is told before the server is asked
    wanted = Client(request.url, timeout_s=request.timeout_s, key=read_key(request.key_from))
    texts = _texts(request)
    with wanted as client, make_progress(request.progress) as progress:
        model = request.model or client.models()[0]
        progress.note(f"measuring {model} at {request.url}")
        served, quality = None, None
        if "prompts" in texts:
            load = Load(
                new_tokens=request.wanted.speed.new_tokens if request.wanted.speed else 64,
                concurrency=request.concurrency,
                requests=request.requests,
            )
            served = time_server(client, model, _prompts(texts["prompts"], request.wanted), load, progress.note)
        if "perplexity" in texts:
            quality = _quality(client, model, texts["perplexity"], request.wanted, progress.note)
    report = _report(request, client.url, model, served, quality, seconds=time.monotonic() - started)
    write.write(report, request.out)
    if request.progress != "none":
        summary.show(report, request.out)
    return report


def read_key(variable: str | None) -> str:
    """Return the API key that an environment variable holds; "" where none is named.

    Raises:
        UsageError: The variable isn't set.
    """
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
    paths = {
        role: resolve_text(text, store, base=request.base, offline=request.offline, note=lambda _: None).path
        for role, text in named.items()
    }
    if wanted.perplexity is not None and records.json_fields(records.read(paths["perplexity"])) is not None:
        message = f"{wanted.perplexity.text} is JSON, and would be scored with its braces and names"
        raise UsageError(message, fix="give prose, or say by a `template` which of its fields are the text")
    return paths


def _prompts(path: Path, wanted: Evaluate) -> list[str]:
    """Return prompts of about the wanted number of tokens: of JSON Lines as they are, of prose cut by characters."""
    from optikit.evaluation import texts

    text = texts.read(path)
    found = list(texts.prompt_fields(path, text))
    if found:
        return found
    length = CHARACTERS_PER_TOKEN * (wanted.speed.prompt_tokens if wanted.speed else 128)
    return [piece for start in range(0, len(text), length) if (piece := text[start : start + length].strip())]


def _quality(client: Client, model: str, path: Path, wanted: Evaluate, note: Callable[[str], None]) -> Quality:
    """Return the perplexity of windows of text, cut by characters, as the server's own tokens have it."""
    import hashlib
    import math

    from optikit.evaluation import texts

    options = wanted.perplexity
    assert options is not None  # noqa: S101 - the caller has looked
    assert options.windows is not None  # noqa: S101 - `_texts` has looked
    text = texts.read(path)
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
    hour = _hour(request.cost)
    served = served and pricing.priced(served, hour)
    reason = "" if hour else UNPRICED
    cost = pricing.under_load(hour, pricing.of_clients(None, served), request.cost.concurrency, reason)
    missing = "size and memory: a server doesn't tell them"
    found = Measurement(size_bytes=None, quality=quality, cost=cost, reason=missing)
    judged = judge.judge(request.gates, values(served, cost))
    return Report(
        verdict=judge.overall(judged),
        recipe={
            "model": url,
            "evaluate": request.wanted.model_dump(mode="json"),
            "cost": request.cost.model_dump(mode="json"),
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


def _hour(wanted: Price) -> Hour | None:
    """Return what an hour of the server's machine costs, as it was said or as a target's row does.

    Raises:
        UsageError: No row with a price has the name that was given.
    """
    if wanted.usd_per_hour is not None:
        return Hour(usd=wanted.usd_per_hour, discount=wanted.discount, source=wanted.source or price.SAID)
    if not wanted.instance:
        return None
    row = targets.rows().get(wanted.instance)
    if row is None or row.usd_per_hour is None:
        fix = "see `optikit targets`, or give --usd-per-hour"
        raise UsageError(f"there is no instance {wanted.instance!r} with a price", fix=fix)
    return Hour(usd=row.usd_per_hour, discount=wanted.discount, source=f"as {row.name}: {row.price_source}")


def values(served: Served | None, cost: Cost) -> dict[str, judge.Value]:
    """Return what gates may limit: what one client alone sees, and the price."""
    alone = next((row for row in served.speed if row.concurrency == 1), None) if served else None
    priced = {check_gates.PRICE: judge.Value(value=cost.usd_per_million_output_tokens, reason=cost.reason)}
    if alone is None:
        return priced
    return priced | {
        "ttft_ms_p50": judge.Value(value=alone.ttft_ms_p50, ci95=alone.ttft_ms_p50_ci95),
        "tpot_ms_p50": judge.Value(value=alone.tpot_ms_p50, ci95=alone.tpot_ms_p50_ci95),
    }
