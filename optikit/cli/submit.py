"""`optikit submit RECIPE --to SCHEDULER --out DIR`: a folder that a cluster runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class To(StrEnum):
    """Schedulers that have a folder."""

    K8S = "k8s"
    SLURM = "slurm"
    SAGEMAKER = "sagemaker"
    SKYPILOT = "skypilot"


def submit(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML.", show_default=False)],
    to: Annotated[To, typer.Option(help="Scheduler.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the job; else the recipe's.")] = "",
    cpus: Annotated[int | None, typer.Option(min=1, help="Processors; else as many as this machine has.")] = None,
    memory: Annotated[str, typer.Option(help="E.g. 32GiB; else what the plan expects, with room.")] = "",
    disk: Annotated[str, typer.Option(help="E.g. 100GiB; else what the plan expects, with room.")] = "",
    hours: Annotated[float | None, typer.Option(min=0.1, help="Longest time of an attempt.")] = None,
    install: Annotated[str, typer.Option(help="What pip installs there; else this version.")] = "",
    image: Annotated[str, typer.Option(help="Container image with Python; else a usual one.")] = "",
    shared: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory that the job sees at the same place.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Plan with what is on this machine.")] = False,
    targets: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file of more targets.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a folder with which a scheduler runs a recipe: manifest or script, the recipe, its texts, a page.

    The job keeps its store on a volume and goes on where it stopped. Nothing is sent: the page has the command.
    """
    from optikit.app import submit as app
    from optikit.deploy import jobs
    from optikit.plan import make_plan
    from optikit.recipe.load import load
    from optikit.store.store import Store
    from optikit.targets import names
    from optikit.text import dump_json

    asked: dict[str, Any] = {
        "cpus": cpus,
        "memory_bytes": _size("--memory", memory),
        "disk_bytes": _size("--disk", disk),
    }
    seconds = None if hours is None else int(hours * 3600)
    asked |= {"install": install} if install else {}
    loaded = load(recipe, overrides=tuple(set_ or ()), known_targets=names(targets))
    plan = make_plan(
        loaded, Store.default(), offline=offline, extra_targets=targets, note=_note, weights=False, digests=False
    )
    made = app.job(loaded, plan, app.Asked(name=name, seconds=seconds, image=image, shared=shared, **asked))
    written = app.write(made, to.value, out)
    command = jobs.load(to.value).command(made)
    if json:
        typer.echo(dump_json({"out": str(out), "files": written, "command": command, "asks": dict(app.asks(made))}))
        return
    for word, value in app.asks(made):
        typer.echo(f"{word:16}  {value}")
    typer.echo(f"wrote {len(written)} files to {out}; next, in that folder:\n  {command}")


def _size(option: str, text: str) -> int | None:
    from optikit.errors import UsageError
    from optikit.recipe.schema import parse_size

    try:
        return parse_size(text) if text else None
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


def _note(line: str) -> None:
    typer.echo(line, err=True)
