"""`optikit sweep RECIPE --vary PATH=A,B --out DIR`: many variants of a recipe, compared."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optikit.app.device import DeviceChoice
from optikit.cli.run import ProgressMode

if TYPE_CHECKING:
    from optikit.evaluation.sweep_results import Sweep


class SearchChoice(StrEnum):
    """How variants are looked for."""

    GRID = "grid"
    RANDOM = "random"
    HALVING = "halving"
    OPTUNA = "optuna"


def sweep(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, with or without `sweep:`.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", show_default=False)],
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH=A,B", help="Values that vary: stages[0].quantize.bits=4,8."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value in all variants.")
    ] = None,
    search: Annotated[SearchChoice | None, typer.Option(help="Instead of the recipe's, which is grid.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, max=1000, help="Combinations to draw.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn.")] = None,
    budget: Annotated[str | None, typer.Option(help="Where to stop: 90m, 2h, $20.")] = None,
    usd_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of a node, for a budget in $.", show_default=False)
    ] = None,
    address: Annotated[
        str, typer.Option(help="Ray cluster: auto, local or HOST:PORT; none runs in turn, here.", show_default=False)
    ] = "",
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Processors of one run on a cluster; all of a node without it.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of one run on a cluster.")] = 0,
    device: Annotated[DeviceChoice, typer.Option(help="As of `optikit run`.")] = DeviceChoice.AUTO,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on the machines.")] = False,
    targets: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file of more targets.")] = None,
    progress: Annotated[
        ProgressMode, typer.Option(envvar="OPTIKIT_PROGRESS", help="auto, plain, json or none.")
    ] = ProgressMode.AUTO,
    json: Annotated[bool, typer.Option("--json", help="Print sweep.json to stdout.")] = False,
) -> None:
    """Run variants of a recipe, steps that they share once, and say which are worth their price.

    Writes sweep.html with the Pareto picture, sweep.json, and each variant's output. The same command goes on where a
    killed sweep stopped.
    """
    from optikit.app.sweep import Request
    from optikit.app.sweep import sweep as run

    asked = {"search": search and search.value, "samples": samples, "seed": seed, "budget": _budget(budget)}
    found = run(
        Request(
            recipe=recipe,
            out=out,
            varied=tuple(vary or ()),
            overrides=tuple(set_ or ()),
            changed={name: value for name, value in asked.items() if value is not None},
            address=address,
            cpus=cpus,
            gpus=gpus,
            usd_per_hour=usd_per_hour,
            device=device.value,
            offline=offline,
            targets=targets,
            progress=progress.value,
        )
    )
    _tell(found, out, json=json, silent=progress == ProgressMode.NONE)
    raise typer.Exit(code_of(found))


def _tell(found: Sweep, out: Path, *, json: bool, silent: bool) -> None:
    from optikit.report import sweep_page
    from optikit.text import dump_json

    if json:
        typer.echo(dump_json(found.model_dump(mode="json"), indent=1))
    elif not silent:
        typer.echo(f"{sweep_page.terminal(found)}\n\n{out / 'sweep.html'}")


def _budget(text: str | None) -> str | None:
    """Return a budget that can be read."""
    from optikit.errors import UsageError
    from optikit.recipe.sweep_section import parse_budget

    try:
        parse_budget(text or "")
    except ValueError as error:
        message, _, fix = str(error).partition("; ")
        raise UsageError(f"--budget: {message}", fix=fix) from None
    return text


def code_of(found: Sweep) -> int:
    """Return the exit code of a sweep: its budget's end, what failed, or that no variant passes its gates."""
    from optikit.errors import Exit

    if found.ended:
        return int(Exit.TIMEOUT)
    failed = {result.code for result in found.variants if result.status == "failed" and result.code}
    if failed:
        return failed.pop() if len(failed) == 1 else int(Exit.STAGE_FAILED)
    verdicts = {result.verdict for result in found.variants if result.status == "done"}
    return int(Exit.GATE_FAILED if verdicts == {"fail"} else Exit.OK)
