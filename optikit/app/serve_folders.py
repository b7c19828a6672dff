"""`serve/SERVER/` of an output: how each server of the recipe's `serve:` is started on what the run wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.deploy import bundles, folder
from optikit.deploy.bundle import Served
from optikit.store import files

if TYPE_CHECKING:
    from optikit.plan import Plan
    from optikit.recipe.load import LoadedRecipe

SPECULATOR = "speculator/speculator.json"
LONGEST_NAME = 40


def write(place: Path, loaded: LoadedRecipe, plan: Plan) -> None:
    """Write a folder for every server that has a bundle; a server named twice gets its last entry's."""
    if not loaded.recipe.serve:
        return
    served = describe(place, loaded, plan)
    for entry in loaded.recipe.serve:
        if entry.server not in bundles.names():  # a library, which nothing starts
            continue
        module = bundles.bundled(entry.server)
        made = module.bundle(entry.options, served)
        texts = folder.files(entry.server, made, served, replicas=entry.options.replicas, checked=module.CHECKED)
        for name, text in texts.items():
            path = place / "serve" / entry.server / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def describe(place: Path, loaded: LoadedRecipe, plan: Plan) -> Served:
    """Return what there is to serve in an output directory."""
    names = list(files.walk(place))
    facts = plan.steps[-1].after if plan.steps else plan.facts
    return Served(
        name=_name(loaded.path.stem),
        folders=frozenset(_folders(names)),
        files=frozenset(names),
        size=sum((place / name).stat().st_size for name in names),
        context=facts.max_positions,
        speculation=_speculation(place),
        target=plan.target,
        facts=facts,
    )


def _name(words: str) -> str:
    """Return a recipe's name as Kubernetes and SageMaker take it: lower case, digits, hyphens, a letter first."""
    found = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return found if found[:1].isalpha() else f"model-{found}".strip("-")[:LONGEST_NAME].strip("-")


def _folders(names: list[str]) -> Iterator[str]:
    """Yield the parts of an output: `model`, `compiled/ENGINE`, `speculator` and its layouts."""
    for name in names:
        parts = name.split("/")
        yield parts[0]
        if parts[0] in ("compiled", "speculator") and len(parts) > 2:
            yield "/".join(parts[:2])


def _speculation(place: Path) -> dict[str, Any]:
    path = place / SPECULATOR
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
