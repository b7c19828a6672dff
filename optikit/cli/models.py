"""`optikit models`: which families a stack can start from, and what works for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from optikit.app.catalogue import Family


WIDTHS = (22, 27, 27)
"""Of the columns of the table, 80 together."""


def models(
    json: Annotated[bool, typer.Option("--json", help="Print as JSON, with why what is refused.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table in Markdown.")] = False,
) -> None:
    """List families of models and what works for each: methods, engines, gguf. Other families walk without a row."""
    from dataclasses import asdict

    from optikit.app.catalogue import families
    from optikit.text import dump_json

    found = families()
    if json:
        typer.echo(dump_json([asdict(family) for family in found], indent=1))
        return
    heading = ("family", "prune", "quantize", "engines and libraries", "gguf")
    cells = [heading, *(_row(family) for family in found)]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        typer.echo("\n".join([lines[0], "|" + "---|" * len(heading), *lines[1:]]))
        return
    from optikit.cli._table import wrapped

    short = [("family", "all but", "engines and libraries"), *(_short(family) for family in found)]
    typer.echo("\n".join(wrapped(short, WIDTHS)))
    typer.echo("any other causal LM of transformers: rtn, gptq, int8 w8a16, wanda, sparsegpt, magnitude", err=True)


def _short(family: Family) -> tuple[str, ...]:
    """Return a row that is broken to fit 80 columns."""
    refused = "; ".join(f"{verb} {', '.join(each)}" for verb, each in family.refused.items() if verb != "compile")
    return family.name, refused, ", ".join([*family.engines, *(["from gguf"] if family.gguf else [])])


def _row(family: Family) -> tuple[str, ...]:
    works = (_but(family, verb) for verb in ("prune", "quantize"))
    return family.name, *works, ", ".join(family.engines), family.gguf


def _but(family: Family, verb: str) -> str:
    """Return what is refused among the methods of a verb; `all` where nothing is."""
    refused = family.refused.get(verb, {})
    return f"all but {', '.join(refused)}" if refused else "all"
