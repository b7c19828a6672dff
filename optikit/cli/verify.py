"""`optikit verify`: read every byte of a sealed directory again and compare it with artifact.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    directory: Annotated[
        Path, typer.Argument(help="An output directory, or an artifact: anything with artifact.json.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check that a directory is exactly what was sealed: no file changed, missing or added (exit 76 if one is).

    Files beside what was sealed, such as reports, are told apart and don't count.
    """
    from optikit.errors import InputMissingError, IntegrityError
    from optikit.store.files import in_units
    from optikit.store.manifest import NAME, damages, is_beside, load
    from optikit.text import clean, dump_json

    if not directory.is_dir():
        raise InputMissingError(f"{directory} is not a directory", fix="name an output directory of `optikit run`")
    if not (directory / NAME).exists():
        raise InputMissingError(f"{directory} has no {NAME}: it was never finished", fix="run its recipe again")
    manifest = load(directory)
    differences = damages(directory, manifest)
    beside = [one.path for one in differences if is_beside(one, manifest)]
    found = [one for one in differences if one.path not in beside]
    if as_json:
        damage = [{"path": one.path, "what": one.what} for one in found]
        counts = {"files": len(manifest.files), "size_bytes": manifest.size_bytes}
        print(dump_json({"ok": not found, **counts, "damage": damage, "unsealed": beside}, indent=1))
    for one in found if not as_json else ():
        print(clean(str(one)))
    if found:
        count = "1 file differs" if len(found) == 1 else f"{len(found)} files differ"
        fix = "run its recipe again into a new directory; what is in the store is used again"
        raise IntegrityError(f"{directory}: {count} from {NAME}", fix=fix)
    if not as_json:
        others = "1 file" if len(beside) == 1 else f"{len(beside)} files"
        more = f"; {others} beside them not sealed" if beside else ""
        print(f"{directory}: {len(manifest.files)} files, {in_units(manifest.size_bytes)}, all as sealed{more}")
