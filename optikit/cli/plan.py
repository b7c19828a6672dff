"""`optikit plan RECIPE`: what would be done, what it would take, what is wrong with it; nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Check a recipe and print its steps with estimates of time, memory and disk. No weight is loaded."""
    import json as json_library

    from optikit.plan import make_plan
    from optikit.plan.render import as_json, render
    from optikit.recipe.load import load
    from optikit.store.store import Store

    store = Store.default()
    loaded = load(recipe, overrides=tuple(set_ or ()))
    made = make_plan(loaded, store, offline=offline, note=lambda text: typer.echo(text, err=True))
    typer.echo(json_library.dumps(as_json(made, store), indent=1) if json else render(made, store))
