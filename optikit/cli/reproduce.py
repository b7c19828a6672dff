"""`optikit reproduce DIR`: make an output again from its sealed recipe and lock, and compare the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def reproduce(
    directory: Annotated[Path, typer.Argument(help="Output directory of a run.", show_default=False)],
    base: Annotated[
        Path, typer.Option(help="Directory that relative paths in its recipe start from.", show_default=False)
    ] = Path(),
    targets: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file of more targets.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    progress: Annotated[str, typer.Option(envvar="OPTIKIT_PROGRESS", help="auto, plain, json or none.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make an output again, from nothing but its sealed recipe and lock, and compare model/ and compiled/ byte by byte.

    The first making isn't used: every step is done again, in a store that is removed afterwards (exit 76 if a file
    differs).
    """
    import json

    from optikit.app.reproduce import Request
    from optikit.app.reproduce import reproduce as again
    from optikit.errors import IntegrityError
    from optikit.text import clean

    found = again(Request(directory=directory, base=base, offline=offline, progress=progress, targets=targets))
    if as_json:
        told = {"ok": not found.differing, "same": list(found.same), "differing": list(found.differing)}
        typer.echo(json.dumps(told, indent=1))
    for name in found.differing if not as_json else ():
        typer.echo(clean(f"{name}: other bytes"))
    if found.differing:
        count = f"{len(found.differing)} of {len(found.differing) + len(found.same)} files"
        fix = "compare the versions in both seals, and the machines: kernels decide bits"
        raise IntegrityError(f"{directory}: {count} came out with other bytes", fix=fix)
    if not as_json:
        typer.echo(f"{directory}: made again, {len(found.same)} files, all with the same bytes")
