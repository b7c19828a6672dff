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

    The reports, recipe and lock of outputs that an earlier version wrote weren't sealed: they are named, and don't
    count.
    """
    from optikit.app.verify import MADE_AGAIN
    from optikit.app.verify import verify as compare
    from optikit.errors import IntegrityError
    from optikit.store.files import in_units
    from optikit.store.manifest import NAME
    from optikit.text import clean, dump_json

    found = compare(directory)
    if as_json:
        damage = [{"path": one.path, "what": one.what} for one in found.damage]
        counts = {"files": found.files, "size_bytes": found.size_bytes}
        told = {"ok": not damage, **counts, "damage": damage, "unsealed": list(found.unsealed)}
        print(dump_json(told, indent=1))
    for one in found.damage if not as_json else ():
        print(clean(str(one)))
    if found.damage:
        count = "1 file differs" if len(found.damage) == 1 else f"{len(found.damage)} files differ"
        raise IntegrityError(f"{directory}: {count} from {NAME}", fix=MADE_AGAIN)
    if not as_json:
        more = f"; not sealed by this version: {', '.join(found.unsealed)}" if found.unsealed else ""
        print(f"{directory}: {found.files} files, {in_units(found.size_bytes)}, all as sealed{more}")
