"""`optikit publish DIR DEST`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def publish(
    directory: Annotated[Path, typer.Argument(help="Output of `optikit run`.", show_default=False)],
    dest: Annotated[
        str,
        typer.Argument(
            help="hf:org/name, oci:registry/name:tag, oci-layout:PATH[:tag], s3://bucket/path, or a directory.",
            show_default=False,
        ),
    ],
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY.pem", help="Sign with this private key: model.sig.", show_default=False)
    ] = None,
    license_: Annotated[
        str, typer.Option("--license", help="Of the base model, where its own card doesn't say.", show_default=False)
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="hf: make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """Publish what a run wrote: the model at the top, a card made from the report, a seal, a signature.

    Nothing goes that isn't as it was sealed, or that holds what looks like a credential.
    """
    from optikit.app.publish import Request, as_json
    from optikit.app.publish import publish as run
    from optikit.store.files import in_units
    from optikit.text import clean, dump_json

    request = Request(directory=directory, dest=dest, key=sign, licence=license_, private=private, dry=dry_run)
    found = run(request, lambda said: typer.echo(clean(said), err=True))
    if json:
        typer.echo(dump_json(as_json(found), indent=1))
        return
    for name, size in sorted(found.files.items()) if dry_run else ():
        typer.echo(f"{in_units(size):>10}  {clean(name)}")
    whole = in_units(sum(found.files.values()))
    digest = f", {found.digest}" if found.digest else ""
    typer.echo(f"{'would go' if dry_run else 'published'}: {len(found.files)} files, {whole}, {clean(dest)}{digest}")
