"""`optikit bench URL|DIR …`: servers or artifacts under load, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Limit = Annotated[float | None, typer.Option(min=0, help="Limit of a good request.", show_default=False)]


def bench(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="URL|DIR …", help="Servers with OpenAI's API, or models to serve for it."),
    ],
    prompts: Annotated[
        Path, typer.Option(help="JSON Lines of {prompt}, or of {prompt, max_tokens}; or lines.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the report.", show_default=False)],
    clients: Annotated[
        str, typer.Option(help="Closed loop: clients that ask again when answered; '' for none.")
    ] = "1,2,4,8",
    rate: Annotated[str, typer.Option(help="Open loop: requests per second at random times.", show_default=False)] = "",
    requests: Annotated[int, typer.Option(min=2, help="Requests of each level.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer whose prompt doesn't say.")] = 64,
    ttft_ms: Limit = None,
    tpot_ms: Limit = None,
    e2e_ms: Limit = None,
    usd_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of the machine that serves.", show_default=False)
    ] = None,
    discount: Annotated[float, typer.Option(min=0, max=0.99, help="Share off that price, e.g. a savings plan's.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random times.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without an answer that count as hung.")] = 120,
    model: Annotated[str | None, typer.Option(help="Which model; by default the first that each serves.")] = None,
    key_from: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable that holds the servers' API key.")
    ] = None,
    progress: Annotated[str, typer.Option(envvar="OPTIKIT_PROGRESS", help="auto, plain, json or none.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print bench.json to stdout.")] = False,
) -> None:
    """Load servers or artifacts in turns and compare latency, throughput, answers and price.

    Writes bench.html with curves over the load, bench.md, bench.json, and every request to samples.jsonl.
    """
    from optikit.app.bench import Request
    from optikit.app.bench import bench as run
    from optikit.app.eval_server import read_key
    from optikit.evaluation.latency_limits import Limits
    from optikit.report import bench_page
    from optikit.text import dump_json

    request = Request(
        targets=targets,
        prompts=prompts,
        out=out,
        clients=tuple(int(each) for each in _numbers(clients, "--clients", whole=True)),
        rates=_numbers(rate, "--rate", whole=False),
        requests=requests,
        new_tokens=new_tokens,
        limits=Limits(ttft_ms=ttft_ms, tpot_ms=tpot_ms, e2e_ms=e2e_ms),
        usd_per_hour=usd_per_hour,
        discount=discount,
        seed=seed,
        timeout_s=timeout,
        model=model,
        key=read_key(key_from),
        progress=progress,
    )
    found = run(request)
    if json or progress != "none":
        typer.echo(dump_json(found.model_dump(mode="json"), indent=1) if json else bench_page.terminal(found))


def _numbers(text: str, option: str, *, whole: bool) -> tuple[float, ...]:
    """Return the numbers of an option.

    Raises:
        UsageError: It is no list of them.
    """
    from optikit.errors import UsageError

    found = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        try:
            value = float(int(part) if whole else float(part))
        except ValueError:
            value = -1
        if not 0 < value <= 1024:
            kind = "whole numbers" if whole else "numbers"
            raise UsageError(f"{option} {text!r} is no list of {kind} up to 1024", fix="write 1,2,4")
        found.append(value)
    return tuple(dict.fromkeys(found))
