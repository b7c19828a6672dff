"""`optikit cache`: what the store holds, whether it is whole, and making room in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from optikit.store.maintenance import Collected
    from optikit.store.store import Artifact, Store

app = typer.Typer(
    help="Look after the store of finished steps and downloads.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List every artifact and download, the one used longest ago first."""
    from datetime import UTC, datetime

    from optikit.cli._table import table
    from optikit.store import maintenance
    from optikit.store.files import in_units
    from optikit.store.store import Store
    from optikit.text import dump_json

    store = Store.default()
    rows = [
        {
            "kind": entry.kind,
            "name": entry.name,
            "what": maintenance.describe(entry),
            "size_bytes": entry.size_bytes,
            "used": datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds"),
        }
        for entry in maintenance.entries(store)
    ]
    total = sum(int(str(row["size_bytes"])) for row in rows)
    if as_json:
        print(dump_json({"root": str(store.root), "size_bytes": total, "entries": rows}, indent=1))
        return
    lines = [("used", "size", "kind", "name", "what")]
    lines += [
        (
            str(row["used"])[:16],
            in_units(int(str(row["size_bytes"]))),
            str(row["kind"]),
            str(row["name"])[:12],
            str(row["what"]),
        )
        for row in rows
    ]
    print("\n".join(table(lines)))
    print(f"{in_units(total)} in {store.root}")


@app.command()
def gc(
    max_size: Annotated[
        str, typer.Option("--max-size", help="Remove what was used longest ago until this much stays, e.g. 20GiB.")
    ] = "",
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="Name of an entry that stays, or its beginning.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove damaged and abandoned work; with --max-size, old results too. Whatever goes can be made again."""
    from optikit.errors import UsageError
    from optikit.recipe.schema import parse_size
    from optikit.store import maintenance
    from optikit.store.files import in_units
    from optikit.store.store import Store
    from optikit.text import dump_json

    try:
        limit = parse_size(max_size) if max_size else None
    except ValueError as error:
        raise UsageError(f"--max-size: {error}") from error
    store = Store.default()
    done = maintenance.gc(store, _named(store, keep or []), limit, dry_run=dry_run)
    if as_json:
        print(dump_json({"dry_run": dry_run} | _as_json(done), indent=1))
        return
    word = "would remove" if dry_run else "removed"
    sys.stdout.write("".join(f"{word} {one.kind} {one.name} ({in_units(one.size_bytes)})\n" for one in done.removed))
    if done.in_use:
        size = in_units(sum(one.size_bytes for one in done.in_use))
        print(f"{len(done.in_use)} more ({size}) are in use by a running process")
    freed = "would be free" if dry_run else "freed"
    print(f"{in_units(done.freed_bytes)} {freed}, {in_units(done.kept_bytes)} stay in {store.root}")
    if limit is None and not done.removed:
        print("nothing is damaged or abandoned; `--max-size 20GiB` removes old results too")


def _as_json(done: Collected) -> dict[str, Any]:
    removed = [{"kind": one.kind, "name": one.name, "size_bytes": one.size_bytes} for one in done.removed]
    in_use = [one.name for one in done.in_use]
    return {"removed": removed, "in_use": in_use, "freed_bytes": done.freed_bytes, "kept_bytes": done.kept_bytes}


def _named(store: Store, beginnings: list[str]) -> set[str]:
    """Return the full names of the entries that the given texts are the beginnings of."""
    from optikit.errors import InputMissingError
    from optikit.store import maintenance

    if not beginnings:
        return set()
    names = [entry.name for entry in maintenance.entries(store)]
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            raise InputMissingError(f"--keep {beginning}: no such entry", fix="`optikit cache list` lists them")
    return {name for name in names if name.startswith(tuple(beginnings))}


Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Artifacts, or beginnings of their names; else all.")
]


@app.command()
def export(
    archive: Annotated[Path, typer.Argument(metavar="FILE.tar", help="Archive to write.", show_default=False)],
    names: Names = None,
    as_json: AsJson = False,
) -> None:
    """Write artifacts to a tar file, with their seals, for `optikit cache import` elsewhere."""
    from optikit.store import archive as tar
    from optikit.store.store import Store

    store = Store.default()
    _tell(tar.export(store, _artifacts(store, names or []), archive), f"written to {archive}", as_json=as_json)


@app.command("import")
def import_(
    archive: Annotated[Path, typer.Argument(metavar="FILE.tar", help="What export wrote.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Put an archive's artifacts in the store: all of them, as sealed, or none (exit 76). Import what you trust."""
    from optikit.store import archive as tar
    from optikit.store.store import Store

    store = Store.default()
    _tell(tar.bring_in(store, archive), f"in {store.root}", as_json=as_json)


@app.command()
def push(names: Names = None, as_json: AsJson = False) -> None:
    """Put artifacts into the second store, $OPTIKIT_REMOTE_STORE: s3://BUCKET/PREFIX, gs://, file://."""
    from optikit.errors import UsageError
    from optikit.store import remote
    from optikit.store.store import Store

    url = remote.configured()
    if not url:
        raise UsageError(f"{remote.URL} isn't set", fix=f"export {remote.URL}=s3://BUCKET/PREFIX")
    store, there = Store.default(), remote.Remote(url)
    found = [artifact for key in _artifacts(store, names or []) if (artifact := store.find(key))]
    _tell([each for each in found if there.put(store, each)], f"put in {url}", as_json=as_json)


def _artifacts(store: Store, beginnings: list[str]) -> list[str]:
    """Return the keys of the artifacts that the given texts are the beginnings of; all for none."""
    from optikit.errors import InputMissingError

    keys = store.keys()
    for beginning in beginnings:
        if not any(key.startswith(beginning) for key in keys):
            raise InputMissingError(f"{beginning}: no such artifact", fix="`optikit cache list` lists them")
    return [key for key in keys if not beginnings or key.startswith(tuple(beginnings))]


def _tell(artifacts: list[Artifact], where: str, *, as_json: bool) -> None:
    from optikit.store.files import in_units
    from optikit.text import dump_json

    size = sum(artifact.manifest.size_bytes for artifact in artifacts)
    if as_json:
        print(dump_json({"artifacts": [artifact.key for artifact in artifacts], "size_bytes": size}, indent=1))
    else:
        print(f"{len(artifacts)} artifacts, {in_units(size)}, {where}")


@app.command()
def check(as_json: AsJson = False) -> None:
    """Read every byte of the store again; set aside what is damaged, to be made again (exit 76 if anything is)."""
    from optikit.errors import IntegrityError
    from optikit.store import maintenance
    from optikit.store.store import Store
    from optikit.text import clean, dump_json

    store = Store.default()
    found = maintenance.fsck(store)
    if as_json:
        damage = {name: [{"path": one.path, "what": one.what} for one in rows] for name, rows in found.items()}
        print(dump_json({"ok": not found, "entries": len(store.keys()), "damage": damage}, indent=1))
    for name, rows in found.items() if not as_json else ():
        print("\n".join(f"{name[:12]} {clean(str(one))}" for one in rows))
    if found:
        message = f"{len(found)} of the store's entries were damaged and are set aside in {store.root / 'corrupt'}"
        raise IntegrityError(message, fix="run the recipes that need them again; look at the disk if it happens twice")
    if not as_json:
        print(f"{len(store.keys())} artifacts, all as sealed, in {store.root}")


@app.command()
def neuron(
    place: Annotated[
        str, typer.Option("--directory", help="The cache: a directory, or s3://BUCKET/PREFIX.")
    ] = "/var/tmp/neuron-compile-cache",  # noqa: S108 - the SDK's own default
    as_json: AsJson = False,
) -> None:
    """List the compiled graphs in a Neuron compile cache: by compiler version, and hashes of graph and flags."""
    from dataclasses import asdict

    from optikit.app import neuron_cache
    from optikit.cli._table import table
    from optikit.store.files import in_units
    from optikit.text import clean, dump_json

    found = neuron_cache.listed(place)
    total = sum(graph.size_bytes for graph in found)
    if as_json:
        print(dump_json({"cache": place, "size_bytes": total, "graphs": [asdict(each) for each in found]}, indent=1))
        return
    lines = [("compiler", "graph", "flags", "size", "state")]
    lines += [
        (
            clean(each.compiler) or "-",
            clean(each.graph),
            clean(each.flags) or "-",
            in_units(each.size_bytes),
            "compiled" if each.compiled else "no result: it failed, or is being compiled",
        )
        for each in found
    ]
    print("\n".join(table(lines)))
    print(f"{len(found)} graphs, {in_units(total)} in {place}")
