"""`optikit diff A B`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from optikit.report.compare import Comparison, Run


def diff(
    a: Annotated[Path, typer.Argument(help="Output directory of the run to compare with.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Output directory of the run to judge.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
) -> None:
    """Compare two runs: what got better, what got worse, and what is only noise.

    Values measured differently are not compared: the rest is printed, then the exit code is 2.
    """
    from optikit.errors import UsageError

    if json and markdown:
        raise UsageError("--json and --markdown exclude each other", fix="choose one of them")
    sides = _runs(a, b)
    from optikit.report import compare

    found = compare.compare(*sides)
    if json:
        from optikit.text import dump_json

        typer.echo(dump_json(compare.as_json(*sides, found), indent=1))
    elif markdown:
        typer.echo(compare.as_markdown(*sides, found), nl=False)
    else:
        _show(*sides, found)
    if found.refused:
        fix = "measure both on the same text with the same window, windows, lengths and threads"
        raise UsageError(f"not compared: {'; '.join(found.refused)}", fix=fix)


def _runs(a: Path, b: Path) -> tuple[Run, Run]:
    from optikit import text
    from optikit.errors import OptikitError
    from optikit.report import compare, write
    from optikit.store.store import Store

    reports = (write.load(a), write.load(b))
    names = [text.clean(str(path)) for path in (a, b)]
    one, other = (compare.Run(name=name, report=report) for name, report in zip(names, reports, strict=True))
    try:
        store = Store.default()
    except OptikitError:  # no store, no raw values: the reports' own figures remain
        return one, other
    return (
        replace(one, nll=compare.stored_nll(one.report, store)),
        replace(other, nll=compare.stored_nll(other.report, store)),
    )


def _show(a: Run, b: Run, found: Comparison) -> None:
    import textwrap

    from optikit.cli._table import table
    from optikit.report import compare, wording

    typer.echo(textwrap.fill(found.sentence, 80, break_on_hyphens=False, break_long_words=False))
    typer.echo("")
    typer.echo(f"A  {a.name}: {wording.what_was_done(a.report)}")
    typer.echo(f"B  {b.name}: {wording.what_was_done(b.report)}")
    typer.echo("")
    for line in table([compare.HEADER, *compare.rows(found)]):
        typer.echo(line)
    typer.echo("")
    for measured in found.lines:
        if measured.how:
            typer.echo(textwrap.fill(f"{measured.label}: {measured.how}", 80, subsequent_indent="  "))
