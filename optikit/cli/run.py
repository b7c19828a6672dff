"""`optikit run RECIPE --out DIR`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from optikit.app.device import DeviceChoice


class ProgressMode(StrEnum):
    """How progress is shown on stderr."""

    AUTO = "auto"
    PLAIN = "plain"
    JSON = "json"
    NONE = "none"


def run(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe file, YAML, or what `optikit plan --out` wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value: stages[0].quantize.bits=8."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this step; `optikit plan` names them.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Also finish steps that were emitted, where their tools and device are.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    progress: Annotated[
        ProgressMode, typer.Option(envvar="OPTIKIT_PROGRESS", help="auto is live on a terminal, else plain lines.")
    ] = ProgressMode.AUTO,
    device: Annotated[
        DeviceChoice, typer.Option(help="Where stages, training and measuring compute.")
    ] = DeviceChoice.AUTO,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes that share a calibration, one GPU each, or their part of the cores.")
    ] = 1,
    targets: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file of more targets.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="An inconclusive gate ends with exit code 11.")] = False,
    junit: Annotated[Path | None, typer.Option(help="Also write gates and steps as JUnit XML.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print report.json to stdout.")] = False,
    update_lock: Annotated[
        bool, typer.Option("--update-lock", help="Accept sources that changed since optikit.lock was written.")
    ] = False,
    lock_timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait for another run of the same step; none waits on.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Where relative paths start, if not at the recipe.")] = None,
) -> None:
    """Run a recipe: make the artifact, measure it, write both and the report to DIR.

    Finished steps are kept in the store: running again continues where it stopped, or does nothing.
    """
    from optikit.app.run import Request, run_recipe
    from optikit.execution.execute import Settings
    from optikit.text import dump_json

    report = run_recipe(
        Request(
            recipe=recipe,
            out=out,
            overrides=tuple(set_ or ()),
            progress=progress.value,
            device=device.value,
            targets=targets,
            junit=junit,
            update_lock=update_lock,
            base=base,
            settings=Settings(until=until, lock_timeout=lock_timeout, offline=offline, resume=resume, ranks=ranks),
        )
    )
    if report is None:
        return
    if json:
        typer.echo(dump_json(report.model_dump(mode="json"), indent=1))
    raise typer.Exit(code_of(report.verdict, strict=strict))


def code_of(verdict: str, *, strict: bool) -> int:
    """Return the exit code of a verdict."""
    from optikit.errors import Exit

    codes = {"fail": Exit.GATE_FAILED, "inconclusive": Exit.GATE_INCONCLUSIVE if strict else Exit.OK}
    return int(codes.get(verdict, Exit.OK))
