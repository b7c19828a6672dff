"""`optikit plan RECIPE`: what would be done, what it would take, what is wrong with it; nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from optikit.errors import RecipeError
    from optikit.plan import Plan
    from optikit.recipe.load import LoadedRecipe


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    targets: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file of more targets.")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Write the nearest recipe that can work.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write it, for `optikit run FILE`: .json.")
    ] = None,
) -> None:
    """Check a recipe and print its steps with estimates of time, memory and disk. No weight is loaded.

    A recipe that can't work also gets the smallest change that makes it plan, as a diff; --fix applies it.
    What --out wrote runs only while recipe, model, texts, target, code and libraries are what they were.
    """
    from optikit.errors import RecipeError
    from optikit.plan import make_plan
    from optikit.plan.render import as_json, render
    from optikit.recipe.load import loads
    from optikit.store.store import Store
    from optikit.targets import names
    from optikit.text import dump_json

    store = Store.default()
    text = _read(recipe)

    def planned(source: str) -> Plan:
        loaded = loads(source, recipe, overrides=tuple(set_ or ()), known_targets=names(targets))
        return make_plan(
            loaded, store, offline=offline, extra_targets=targets, note=lambda line: typer.echo(line, err=True)
        )

    try:
        made = planned(text)
    except RecipeError as error:
        repaired = _repaired(text, recipe, error, planned)
        if not (fix and repaired):
            raise
        recipe.write_text(repaired, encoding="utf-8")
        made = planned(repaired)
    if out is not None:
        _write(out, made, loads(_read(recipe), recipe, overrides=tuple(set_ or ())), tuple(set_ or ()), targets)
    typer.echo(dump_json(as_json(made, store), indent=1) if json else render(made, store))


def _write(out: Path, made: Plan, loaded: LoadedRecipe, overrides: tuple[str, ...], targets: Path | None) -> None:
    from optikit.errors import UsageError
    from optikit.plan.frozen import freeze
    from optikit.report.write import put
    from optikit.text import dump_json

    if out.suffix != ".json":
        raise UsageError(f"--out {out} doesn't end in .json", fix=f"write --out {out.with_suffix('.json')}")
    put(out, dump_json(freeze(made, loaded, overrides=overrides, targets=targets), indent=1) + "\n")


def _read(recipe: Path) -> str:
    from optikit.errors import InputMissingError

    try:
        return recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputMissingError(f"{recipe} can't be read: {error}", fix="check the path of the recipe") from error


def _repaired(text: str, recipe: Path, error: RecipeError, planned: Callable[[str], Plan]) -> str | None:
    """Print the nearest recipe that plans as a diff on stdout and return it; None if no small change helps."""
    from optikit.errors import OptikitError, RecipeError
    from optikit.problems import Problem
    from optikit.rules.repair import repair

    def attempt(source: str) -> tuple[Problem, ...]:
        try:
            planned(source)
        except RecipeError as found:
            return found.problems or (Problem(code="recipe", message=found.message),)
        except OptikitError as found:
            return (Problem(code="source", message=found.message),)
        return ()

    found = repair(text, error.problems, attempt)
    if found is None:
        return None
    typer.echo("# the nearest recipe that can work (`optikit plan --fix` writes it):")
    typer.echo(found.diff(text, recipe.name))
    return found.text
