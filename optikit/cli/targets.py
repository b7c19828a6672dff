"""`optikit targets`: where an artifact can run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from optikit.targets import Target


def targets(
    extra: Annotated[
        Path | None, typer.Option("--targets", metavar="FILE", help="A TOML file with rows of your own.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every field, with sources, as JSON.")] = False,
) -> None:
    """List the targets that a recipe may name: hardware, engines, price. Empty means not documented."""
    from dataclasses import asdict

    from optikit.targets import rows
    from optikit.targets.target import present
    from optikit.text import dump_json

    found = [present(target) for target in rows(extra).values()]
    if json:
        typer.echo(dump_json([asdict(target) for target in found], indent=1))
        return
    from optikit.cli._table import table

    heading = ("target", "accelerator", "memory GiB", "GB/s", "bf16 TFLOPS", "tensor parallel", "$/hour")
    typer.echo("\n".join(table([heading, *(_row(target) for target in found)])))
    typer.echo("prices: on demand, with source and date in `optikit targets --json`", err=True)


def _row(target: Target) -> tuple[str, ...]:
    accelerator = target.accelerator if target.count == 1 else f"{target.count} x {target.accelerator}"
    return (
        target.name,
        accelerator[:32],
        _number(target.memory_gib, target.count),
        _number(target.bandwidth_gb_s, target.count),
        _number(target.bf16_tflops, target.count),
        " ".join(map(str, target.tensor_parallel)),
        "" if target.usd_per_hour is None else f"{target.usd_per_hour:.4g}",
    )


def _number(value: float | None, count: int) -> str:
    return "" if value is None else f"{value * count:.4g}"
