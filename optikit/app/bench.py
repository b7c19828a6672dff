"""`optikit bench` as one function: servers, or artifacts that are served for it, under the same load, in turns.

Closed loop: clients that each ask again when they are answered. Open loop: requests at random times, whatever comes
back. The variants take turns level by level, so that what the machine does meanwhile falls on all of them.
"""

from __future__ import annotations

import platform
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optikit import __version__, host, records
from optikit.app.output_dir import require_no_seal
from optikit.errors import InputMissingError, OptikitError, UnavailableError, UsageError
from optikit.evaluation import bench_results, load_test
from optikit.evaluation.bench_results import Bench, Kind, Level, Limits, Reply, Row, Sample, Variant
from optikit.process import env_variables, server
from optikit.progress import make as make_progress
from optikit.runtime.completions_client import Client, Streamed

START_SECONDS = 300
"""How long a server that is started here may take to load."""
WARM = 2
"""Requests to each variant before any is counted, beside the one that asks which parameters it takes."""


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
    seed: int = 0
    timeout_s: float = 120
    model: str | None = None
    key: str = field(default="", repr=False)
    progress: str = "auto"


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A prompt, and how many tokens its answer gets."""

    prompt: str
    new_tokens: int


@dataclass
class _Target:
    """A variant with its client, and what it answered."""

    variant: Variant
    client: Client
    extra: Mapping[str, Any]
    first: list[Reply] = field(default_factory=list)

    def send(self, asked: Sequence[_Asked]) -> load_test.Send:
        """Return what asks for the answer to a prompt, by its number."""

        def ask(number: int) -> Streamed:
            one = asked[number]
            return self.client.stream(self.variant.model, one.prompt, one.new_tokens, extra=self.extra)

        return ask


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
    asked = _prompts(request)
    with ExitStack() as stack:
        progress = stack.enter_context(make_progress(request.progress))
        targets = [stack.enter_context(_open(each, request, asked[0], progress.note)) for each in _names(request)]
        rows, samples = _measured(targets, asked, request, progress.note)
    result = Bench(
        variants=tuple(each.variant for each in targets),
        rows=tuple(rows),
        identity=tuple(bench_results.identity(targets[0].first, each.variant.name, each.first) for each in targets[1:]),
        limits=request.limits,
        usd_per_hour=request.usd_per_hour,
        seed=request.seed,
        new_tokens=request.new_tokens,
        prompts=len(asked),
        end_of_text_ignored=all("ignore_eos" in each.extra for each in targets),
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


def _prompts(request: Request) -> list[_Asked]:
    """Read the prompts, each with the length of its answer."""
    text = records.read(request.prompts)
    found = []
    for number, entry in records.parse(text, request.prompts):
        prompt, tokens = entry.get("prompt"), entry.get("max_tokens", request.new_tokens)
        if not isinstance(prompt, str) or not prompt or type(tokens) is not int or tokens < 2:
            message = f"{request.prompts}: record {number} has no `prompt`, or a `max_tokens` below 2"
            raise UsageError(message, fix='write {"prompt": "…"} or {"prompt": "…", "max_tokens": 64}')
        found.append(_Asked(prompt=prompt, new_tokens=tokens))
    found = found or [_Asked(prompt=line, new_tokens=request.new_tokens) for _, line in records.lines(text)]
    if not found:
        raise InputMissingError(f"{request.prompts} holds no prompts", fix='write {"prompt": "…"} per line')
    return found


@contextmanager
def _open(named: tuple[str, str], request: Request, first: _Asked, note: Callable[[str], None]) -> Iterator[_Target]:
    """Return a target that answers, and is warm; one that isn't a server yet is served until the block ends."""
    name, place = named
    with ExitStack() as stack:
        url = place if _is_url(place) else stack.enter_context(_serving(Path(place), request, note))
        client = stack.enter_context(Client(url, timeout_s=request.timeout_s, key=request.key))
        model = request.model or client.models()[0]
        more = {"return_token_ids": True} if not _is_url(place) else {}
        extra = {**load_test.accepted(client, model, first.prompt, first.new_tokens, more), **more}
        for _ in range(WARM):
            client.stream(model, first.prompt, first.new_tokens, extra=extra)
        variant = Variant(name=name, url=client.url, model=model, started_here=not _is_url(place))
        yield _Target(variant=variant, client=client, extra=extra)


@contextmanager
def _serving(directory: Path, request: Request, note: Callable[[str], None]) -> Iterator[str]:
    """Serve a directory as `optikit serve` does; return the address."""
    from optikit.app import door

    door.enter(directory)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    most = max([*request.clients, *(16 for _ in request.rates)])
    command = [sys.executable, "-m", "optikit", "serve", str(directory.resolve()), "--port", str(port)]
    command += ["--batch", str(most), "--queue", str(max(64, request.requests))]
    environ = env_variables.kept() | env_variables.OFFLINE | ({"OPTIKIT_API_KEY": request.key} if request.key else {})
    url = f"http://127.0.0.1:{port}"
    request.out.mkdir(parents=True, exist_ok=True)
    log = request.out / f"serve-{port}.log"
    note(f"serving {directory}")
    with server.running(
        f"optikit serve {directory}",
        command,
        environ=environ,
        log=log,
        answers=lambda: _answers(url, request.key),
        start_s=START_SECONDS,
    ):
        yield url
    log.unlink(missing_ok=True)


def _answers(url: str, key: str) -> bool:
    with Client(url, timeout_s=5, key=key) as client:
        try:
            return bool(client.models())
        except OptikitError:
            return False


def _measured(
    targets: Sequence[_Target], asked: Sequence[_Asked], request: Request, note: Callable[[str], None]
) -> tuple[list[Row], list[Sample]]:
    """Run all levels, each of every target before the next."""
    loads: list[tuple[Kind, float]] = [("clients", float(each)) for each in request.clients]
    loads += [("rate", each) for each in request.rates]
    rows, samples = [], []
    for kind, load in loads:
        for target in targets:
            level = Level(target.variant.name, kind, load)
            note(f"{level.variant}: {load:g} {'clients' if kind == 'clients' else 'requests per s'}")
            replies = _run(target, level, asked, request)
            rows.append(bench_results.row(level, replies, request.limits, usd_per_hour=request.usd_per_hour))
            begun = min(each.due_ns for each in replies)
            samples += [bench_results.sample(level, each, begun) for each in replies]
            target.first = target.first or replies
    return rows, samples


def _run(target: _Target, level: Level, asked: Sequence[_Asked], request: Request) -> list[Reply]:
    """Run one level of one target.

    Raises:
        UnavailableError: It answered nothing.
    """
    count = max(request.requests, 2 * int(level.load) if level.kind == "clients" else 2)
    numbers = [i % len(asked) for i in range(count)]
    send = target.send(asked)
    if level.kind == "clients":
        replies = load_test.closed_loop(send, numbers, int(level.load))
    else:
        replies = load_test.open_loop(send, numbers, level.load, request.seed)
    if all(each.streamed is None for each in replies):
        raise UnavailableError(f"{level.variant} answered nothing: {replies[0].error}", fix="see its log")
    return replies
