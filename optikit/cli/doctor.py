"""`optikit doctor`: what this machine can do, what stands in its way, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from optikit.app.doctor import Finding


def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure memory bandwidth and matrix products first, some seconds.")
    ] = False,
    online: Annotated[bool, typer.Option("--online", help="Also ask the model hub whether it answers.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Examine python, processor, memory, disk, devices and libraries. Ends with 69 if something fails."""
    from dataclasses import asdict

    from optikit.app.doctor import calibrate as calibrate_machine
    from optikit.app.doctor import examine
    from optikit.errors import Exit
    from optikit.text import dump_json

    if calibrate:
        typer.echo("measuring this machine...", err=True)
        calibrate_machine()
    findings = list(examine(online=online))
    if json:
        typer.echo(dump_json([asdict(finding) for finding in findings], indent=1))
    else:
        width = max(len(finding.what) for finding in findings)
        typer.echo("\n".join(line for finding in findings for line in _lines(finding, width)))
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(int(Exit.UNAVAILABLE))


def _lines(finding: Finding, width: int) -> list[str]:
    lines = [f"{finding.status:4}  {finding.what:{width}}  {finding.detail}"]
    return [*lines, f"      {'':{width}}  fix: {finding.fix}"] if finding.fix else lines
