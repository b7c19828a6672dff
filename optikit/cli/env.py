"""`optikit env`: the managed environments of libraries that can't live in the main one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from optikit.environments import Environment
    from optikit.store.store import Store

app = typer.Typer(help="Build, check and remove the environments that some backends run in.", no_args_is_help=True)

Names = Annotated[list[str] | None, typer.Argument(help="Environments; all of them where none is named.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List every environment, whether it is built, and what it is for."""
    from optikit.cli._table import table
    from optikit.store.files import in_units
    from optikit.store.store import Store
    from optikit.text import dump_json

    rows = [_row(environment) for environment in _environments(Store.default(), None)]
    if as_json:
        print(dump_json(rows, indent=1))
        return
    lines = [("name", "state", "size", "packages", "what")]
    for row in rows:
        size = in_units(row["size_bytes"]) if row["size_bytes"] else ""
        lines.append((row["name"], row["state"], size, str(row["packages"]), row["summary"]))
    print("\n".join(table(lines)))


@app.command()
def build(
    names: Names = None,
    wheels: Annotated[
        Path | None,
        typer.Option("--wheels", help="Build from the distributions in this folder alone, without any index."),
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build also what is complete.")] = False,
) -> None:
    """Build environments ahead of the run that needs them. Ends with 69 if the index lacks something, 76 if it lies."""
    from optikit.environments import ensure
    from optikit.store.store import Store

    store = Store.default()
    for environment in _environments(store, names):
        name = environment.definition.name
        made = ensure(name, store, wheels=wheels, rebuild=rebuild, note=lambda line: typer.echo(line, err=True))
        print(f"{name}  {made.python}")


@app.command()
def check(names: Names = None, as_json: AsJson = False) -> None:
    """Import what has to import, compare every version with the lock, in what is built. Ends with 69 if one fails."""
    from optikit.errors import UnavailableError
    from optikit.store.store import Store
    from optikit.text import dump_json

    found, missing = {}, []
    for environment in _environments(Store.default(), names):
        if environment.state() == "missing":
            missing.append(environment.definition.name)
        else:
            found[environment.definition.name] = environment.troubles()
    if as_json:
        print(dump_json(found, indent=1))
    else:
        for line in _lines(found, missing):
            print(line)
    broken = [name for name, troubles in found.items() if troubles]
    if broken:
        fix = f"optikit env build --rebuild {' '.join(broken)}"
        raise UnavailableError(f"{len(broken)} of {len(found)} environments aren't healthy", fix=fix)


def _lines(found: Mapping[str, Sequence[str]], missing: Sequence[str]) -> Iterator[str]:
    """Yield what is said of each environment: what is wrong with those that are built, then what isn't built."""
    for name, troubles in found.items():
        yield from (f"{name}  {trouble}" for trouble in troubles or ["as locked"])
    for name in missing:
        yield f"{name}  not built; the first step that needs it builds it, or `optikit env build {name}`"


@app.command()
def gc(
    all_: Annotated[bool, typer.Option("--all", help="Remove every environment, not only what nothing needs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove environments of other versions of their locks, and incomplete ones; never one that is in use."""
    from optikit.environments.housekeeping import collect
    from optikit.store.files import in_units
    from optikit.store.store import Store
    from optikit.text import dump_json

    rows = collect(Store.default(), everything=all_, dry_run=dry_run)
    if as_json:
        print(dump_json([{"name": row.name, "size_bytes": row.size_bytes, "what": row.what} for row in rows], indent=1))
        return
    for row in rows:
        print(f"{row.what}  {row.name}  {in_units(row.size_bytes)}")
    if not rows:
        print("nothing to remove; `--all` removes what is complete, too")


def _environments(store: Store, names: list[str] | None) -> list[Environment]:
    from optikit import environments

    wanted = names or environments.names()
    return [environments.locate(environments.find(name), store.root) for name in wanted]


def _row(environment: Environment) -> dict[str, Any]:
    from optikit.environments.housekeeping import size

    definition = environment.definition
    return {
        "name": definition.name,
        "state": environment.state(),
        "size_bytes": size(environment.path),
        "packages": len(definition.pins),
        "digest": definition.digest,
        "python": str(environment.python),
        "summary": definition.summary,
    }
