"""`optikit presets [MODEL|TARGET]`: stacks worth trying first, with what was recorded of them."""

from __future__ import annotations

from typing import Annotated

import typer


def presets(
    what: Annotated[
        str, typer.Argument(metavar="[MODEL|TARGET]", help="A directory, a model_type, a part of a name, a target.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print every field, with records, as JSON.")] = False,
) -> None:
    """List stacks worth trying for a family of models on a target, each with its recorded figures or without."""
    import textwrap
    from dataclasses import asdict

    from optikit.app import presets as app
    from optikit.text import dump_json

    found = app.matching(what)
    if json:
        typer.echo(dump_json([asdict(one) for one in found], indent=1))
        return
    for one in found:
        typer.echo(f"{one.name}  ({one.target}, {one.kind})")
        lines = [one.why, "; ".join(one.stages), f"record: {one.figures()}", one.provenance()]
        for line in filter(None, lines):
            typer.echo(textwrap.fill(line, 78, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))
    typer.echo("next: optikit init --preset NAME [--model SOURCE] recipe.yaml", err=True)
