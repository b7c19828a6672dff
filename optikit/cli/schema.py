"""`optikit schema`: the JSON Schema of recipes, for editors."""

from __future__ import annotations

import typer


def schema() -> None:
    """Print the JSON Schema (draft-07) of recipes, with the options of every stage.

    Editors with a YAML language server check and complete a recipe whose first line is
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from optikit.recipe.jsonschema import export
    from optikit.text import dump_json

    typer.echo(dump_json(export(), indent=2))
