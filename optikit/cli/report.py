"""`optikit report DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[Path, typer.Argument(help="Output directory of a run.", show_default=False)],
    junit: Annotated[Path | None, typer.Option(help="Also write gates and steps as JUnit XML.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print report.json to stdout.")] = False,
) -> None:
    """Render report.md and report.html again from report.json, and show the summary."""
    from optikit.app import output_dir
    from optikit.report import junit as junit_xml
    from optikit.report import summary, write
    from optikit.text import dump_json

    found = write.load(directory)
    home = directory if directory.is_dir() else directory.parent
    output_dir.render_reports(home, found)
    if junit is not None:
        write.put(junit, junit_xml.render(found))
    if json:
        typer.echo(dump_json(found.model_dump(mode="json"), indent=1))
    summary.show(found, home)
