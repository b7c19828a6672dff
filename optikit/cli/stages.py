"""`optikit stages`: what a recipe's stages can be."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def stages(json: Annotated[bool, typer.Option("--json", help="Print as JSON, with every option.")] = False) -> None:
    """List verbs and methods, in the order in which they may stand, each with what it does and where it runs."""
    from optikit.text import dump_json

    rows = [_row(verb, method) for verb, method in _all()]
    if json:
        typer.echo(dump_json(rows, indent=1))
        return
    from optikit.cli._table import table

    heading = ("verb", "method", "environment", "what")
    cells = [(r["verb"], r["method"], r["environment"] or "", r["summary"]) for r in rows]
    typer.echo("\n".join(table([heading, *cells])))


def _all() -> list[tuple[str, str]]:
    from optikit.stages import registry

    return [(verb, method) for verb, methods in registry().items() for method in methods]


def _row(verb: str, method: str) -> dict[str, Any]:
    from optikit.stages import OURS, backend_names, load

    stage = load(verb, method)
    inputs = stage.inputs(stage.Options.model_construct())  # as it is with default options
    others = {name: load(verb, method, name) for name in backend_names(verb, method) if name != OURS}
    return {
        "verb": verb,
        "method": method,
        "summary": stage.SUMMARY,
        "needs": sorted(stage.NEEDS),
        "calibrated": any(one.of == "calibration" for one in inputs.values()),
        "environment": stage.ENVIRONMENT,
        "options": stage.Options.model_json_schema(),
        "backends": {
            name: {
                "summary": other.SUMMARY,
                "environment": other.ENVIRONMENT,
                "options": other.Options.model_json_schema(),
            }
            for name, other in others.items()
        },
    }
