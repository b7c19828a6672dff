"""`optikit eval DIR|URL`: measure a model or a server as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optikit.app.device import DeviceChoice

if TYPE_CHECKING:
    from optikit.evaluation.results import Report

Key = Annotated[str | None, typer.Option(metavar="VARIABLE", help="URL: environment variable with its API key.")]
Usd = Annotated[float | None, typer.Option(min=0, help="Price of the machine that serves.", show_default=False)]
Instance = Annotated[str, typer.Option(help="A row of `optikit targets` whose price counts.", show_default=False)]


def eval_(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="DIR|URL",
            help="A model directory, the output of a run, a compiled directory, or an OpenAI-compatible server.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the report.", show_default=False)],
    recipe: Annotated[
        Path | None, typer.Option(help="Measure what this recipe's `evaluate` and `gates` say, instead of --text.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="UTF-8 text: perplexity, and prompts where there are none.")] = None,
    prompts: Annotated[str | None, typer.Option(help="JSON Lines of {prompt} for speed.")] = None,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME=FILE", help="JSON Lines of a task's items.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded per prompt.")] = 64,
    concurrency: Annotated[str, typer.Option(help="URL: requests at a time.")] = "1,2,4,8",
    requests: Annotated[int, typer.Option(min=2, help="URL: requests per concurrency.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="URL: seconds without an answer that count as hung.")] = 60,
    model: Annotated[str | None, typer.Option(help="URL: which model; the first that it serves if left out.")] = None,
    key_from: Key = None,
    usd_per_hour: Usd = None,
    instance: Instance = "",
    discount: Annotated[float, typer.Option(min=0, max=0.99, help="Share off that price, e.g. a savings plan's.")] = 0,
    device: Annotated[DeviceChoice, typer.Option(help="DIR: where it computes.")] = DeviceChoice.CPU,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    progress: Annotated[str, typer.Option(envvar="OPTIKIT_PROGRESS", help="auto, plain, json or none.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print report.json to stdout.")] = False,
) -> None:
    """Measure a model directory, an artifact or a server, without optimizing it.

    Perplexity of --text, answers to every --task, speed on --prompts. Two reports are compared by `optikit diff`.
    A server is measured from outside: it needs --prompts or --text; its perplexity only where it echoes logprobs.
    """
    from optikit.cli.run import code_of
    from optikit.text import dump_json

    asked = _asked(recipe, text=text, prompts=prompts, tasks=task or [], new_tokens=new_tokens)
    asked |= _priced(usd_per_hour=usd_per_hour, instance=instance or None, discount=discount or None)
    asked |= {"out": out, "offline": offline, "progress": progress}
    if subject.startswith(("http://", "https://")):
        from optikit.app import eval_server

        report: Report = eval_server.measure(
            eval_server.Request(
                url=subject,
                concurrency=_levels(concurrency),
                requests=requests,
                timeout_s=timeout,
                model=model,
                key_from=key_from,
                **asked,
            )
        )
    else:
        from optikit.app import eval_model

        report = eval_model.measure(eval_model.Request(subject=Path(subject), device=device, **asked))
    if json:
        typer.echo(dump_json(report.model_dump(mode="json"), indent=1))
    raise typer.Exit(code_of(report.verdict, strict=False))


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command("eval")(eval_)


def _priced(**options: float | str | None) -> dict[str, Any]:
    """Return the price that options tell; nothing where they tell none: then a recipe's counts."""
    from pydantic import ValidationError

    from optikit.errors import UsageError
    from optikit.recipe.schema import Price

    given = {name: value for name, value in options.items() if value is not None}
    try:
        return {"cost": Price.model_validate(given)} if given else {}
    except ValidationError as error:
        raise UsageError(f"--usd-per-hour: {error.errors()[0]['msg']}", fix="give one price, above zero") from error


def _asked(
    recipe: Path | None, *, text: str | None, prompts: str | None, tasks: list[str], new_tokens: int
) -> dict[str, Any]:
    """Return what to measure, gates and price: a recipe's, or what the options say; and where relative paths start."""
    from pydantic import ValidationError

    from optikit.errors import UsageError
    from optikit.recipe.load import load
    from optikit.recipe.schema import Evaluate

    if recipe is not None:
        if text or prompts or tasks:
            raise UsageError("--recipe says all that is measured", fix="leave out --text, --prompts and --task")
        loaded = load(recipe)
        found = loaded.recipe
        return {"wanted": found.evaluate, "gates": dict(found.gates), "base": loaded.base, "cost": found.cost}
    given: dict[str, Any] = {"tasks": [_task(each) for each in tasks]}
    if text:
        given["perplexity"] = {"text": text}
    if text or prompts:
        given["speed"] = {"prompts": prompts or "", "new_tokens": new_tokens}
    try:
        return {"wanted": Evaluate.model_validate(given)}
    except ValidationError as error:
        raise UsageError(f"can't measure that: {error.errors()[0]['msg']}", fix="see `optikit eval --help`") from error


def _task(given: str) -> dict[str, str]:
    from optikit.errors import UsageError

    name, equals, file = given.partition("=")
    if not equals or not name or not file:
        raise UsageError(f"--task {given!r} names no file", fix="write --task NAME=FILE.jsonl")
    return {"name": name, "text": file}


def _levels(text: str) -> tuple[int, ...]:
    from optikit.errors import UsageError

    parts = text.split(",")
    if not all(part.strip().isdigit() and 1 <= int(part) <= 1024 for part in parts):
        raise UsageError(f"--concurrency {text!r} is no list of numbers from 1 to 1024", fix="write 1,2,4,8")
    return tuple(dict.fromkeys(int(part) for part in parts))
