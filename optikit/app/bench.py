"""`optikit bench` as one function: servers, or artifacts that are served for it, under the same load, in turns.

Closed loop: clients that each ask again when they are answered. Open loop: requests at random times, whatever comes
back. The variants take turns level by level, so that what the machine does meanwhile falls on all of them.
"""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from optikit import __version__, host
from optikit.app.output_dir import require_no_seal
from optikit.errors import UsageError
from optikit.evaluation import bench_results, load_test
from optikit.evaluation.bench_results import Bench, Reply, Sample, Variant
from optikit.evaluation.cost import Hour
from optikit.evaluation.latency_limits import Limits
from optikit.evaluation.results import LoadRow
from optikit.progress import make as make_progress
from optikit.runtime.completions_client import Client
from optikit.serving import started

START_SECONDS = 300
"""How long a server that is started here may take to load."""
RATE_BATCH = 16
"""Answers at once of a server that is started for requests at random times."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for.

    Attributes:
        targets: Addresses of servers, and directories to serve.
        prompts: JSON Lines of {prompt, max_tokens}, or lines of text.
        out: Where the report goes.
        clients: Numbers of clients, closed loop.
        rates: Requests per second, open loop.
        requests: Requests of each level, at least.
        new_tokens: Tokens of an answer whose prompt doesn't say.
        limits: What a good request keeps.
        usd_per_hour: Price of the machine.
        discount: Share that is taken off it.
        seed: Of the times of open loops.
        timeout_s: Seconds without an answer that count as hung.
        model: Which model of the servers; None is their first.
        key: API key of the servers.
        progress: How progress is shown.
    """

    targets: Sequence[str]
    prompts: Path
    out: Path
    clients: Sequence[int] = (1, 2, 4, 8)
    rates: Sequence[float] = ()
    requests: int = 32
    new_tokens: int = 64
    limits: Limits = field(default_factory=Limits)
    usd_per_hour: float | None = None
    discount: float = 0.0
    seed: int = 0
    timeout_s: float = 120
    model: str | None = None
    key: str = field(default="", repr=False)
    progress: str = "auto"


@dataclass
class _Target:
    """A variant with its server, and what it answered first."""

    variant: Variant
    loading: load_test.Loading
    first: list[Reply] = field(default_factory=list)


def bench(request: Request) -> Bench:
    """Load the targets and write bench.json, samples.jsonl, bench.md and bench.html to `request.out`.

    Raises:
        InputMissingError: No prompts, or no such directory.
        UnavailableError: A server can't be reached, or answers nothing at all.
        UsageError: Nothing to do, or the same target twice.
    """
    from optikit.report import bench_page

    started = time.monotonic()
    require_no_seal(request.out)
    if not (request.clients or request.rates):
        raise UsageError("no load is asked for", fix="give --clients or --rate")
    asked = load_test.read_prompts(request.prompts, request.new_tokens)
    with ExitStack() as stack:
        progress = stack.enter_context(make_progress(request.progress))
        targets = [stack.enter_context(_open(each, request, asked, progress.note)) for each in _names(request)]
        rows, samples = _measured(targets, request, progress.note)
    result = Bench(
        variants=tuple(each.variant for each in targets),
        rows=tuple(rows),
        identity=tuple(bench_results.identities([(each.variant.name, each.first) for each in targets])),
        limits=request.limits,
        usd_per_hour=request.usd_per_hour,
        discount=request.discount,
        seed=request.seed,
        new_tokens=request.new_tokens,
        prompts=len(asked),
        end_of_text_ignored=all("ignore_eos" in each.loading.extra for each in targets),
        host=host.describe(),
        versions={"optikit": __version__, "python": platform.python_version()},
        seconds=time.monotonic() - started,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["optikit", *sys.argv[1:]]),
    )
    bench_page.write(result, samples, request.out)
    return result


def _names(request: Request) -> list[tuple[str, str]]:
    """Return name and place of each target."""
    if len(set(request.targets)) < len(request.targets):
        raise UsageError("a target is named twice", fix="name each once")
    found = [(each if _is_url(each) else Path(each).resolve().name, each) for each in request.targets]
    names = [name for name, _ in found]
    return [(place if names.count(name) > 1 else name, place) for name, place in found]


def _is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))


@contextmanager
def _open(
    named: tuple[str, str], request: Request, asked: Sequence[load_test.Asked], note: Callable[[str], None]
) -> Iterator[_Target]:
    """Return a target that answers, and is warm; one that isn't a server yet is served until the block ends."""
    name, place = named
    with ExitStack() as stack:
        url = place if _is_url(place) else stack.enter_context(_serving(Path(place), request, note))
        client = stack.enter_context(Client(url, timeout_s=request.timeout_s, key=request.key))
        model = request.model or client.models()[0]
        more = {"return_token_ids": True} if not _is_url(place) else {}
        variant = Variant(name=name, url=client.url, model=model, started_here=not _is_url(place))
        yield _Target(variant=variant, loading=load_test.warmed(client, model, asked, more))


@contextmanager
def _serving(directory: Path, request: Request, note: Callable[[str], None]) -> Iterator[str]:
    """Serve a directory as `optikit serve` does; return the address."""
    from optikit.app import door

    door.enter(directory)
    request.out.mkdir(parents=True, exist_ok=True)
    note(f"serving {directory}")
    most = max([*request.clients, *(RATE_BATCH for _ in request.rates)])
    how = started.Serving(directory=directory, batch=most, queue=max(64, request.requests), key=request.key)
    log = request.out / f"serve-{directory.resolve().name}.log"
    with started.serving(how, log=log, start_s=START_SECONDS) as (url, _):
        yield url
    log.unlink(missing_ok=True)


def _measured(
    targets: Sequence[_Target], request: Request, note: Callable[[str], None]
) -> tuple[list[LoadRow], list[Sample]]:
    """Run all levels, each of every target before the next."""
    rows, samples = [], []
    price = request.usd_per_hour
    hour = None if price is None else Hour(usd=price, discount=request.discount)
    of_each = [load_test.levels(each.variant.name, request.clients, request.rates) for each in targets]
    for number in range(len(of_each[0])):
        for target, own in zip(targets, of_each, strict=True):
            level = own[number]
            note(f"{level.variant}: {level.load:g} {'clients' if level.kind == 'clients' else 'requests per s'}")
            prompts = len(target.loading.asked)
            replies = load_test.run(target.loading.send, level, prompts, requests=request.requests, seed=request.seed)
            rows.append(bench_results.row(level, replies, request.limits, hour=hour))
            begun = min(each.due_ns for each in replies)
            samples += [bench_results.sample(level, each, begun) for each in replies]
            target.first = target.first or replies
    return rows, samples
