"""`optikit reproduce` as one function: make an output again from its sealed recipe and lock, and compare the bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optikit import targets
from optikit.app import output_dir, verify
from optikit.errors import InputMissingError, IntegrityError
from optikit.execution.execute import Settings, execute, until
from optikit.plan import Plan, make_plan, room
from optikit.progress import make as make_progress
from optikit.recipe.load import LoadedRecipe, loads
from optikit.store import files
from optikit.store.sources import LOCK, check_lock, read_lock
from optikit.store.store import ENVIRONMENTS, Store

COMPARED = ("model/", "compiled/")
"""What a run decides to the byte; what drafts is chosen by measured times, and reports hold them."""
NO_KEY = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for.

    Attributes:
        directory: An output of a run.
        base: Where the recipe's relative paths start.
    """

    directory: Path
    base: Path = Path()
    offline: bool = False
    progress: str = "auto"
    targets: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """How a second making compares with the first.

    Attributes:
        same: Files with the same bytes.
        differing: Files with other bytes, or that one of the two lacks.
    """

    same: tuple[str, ...]
    differing: tuple[str, ...]


def reproduce(request: Request) -> Reproduced:
    """Make an output again in a store of its own, where nothing is kept from the first time, and compare.

    Downloads and managed environments, each checked by its digest, are used again; nothing is measured.

    Raises:
        InputMissingError: The directory is no output, or one of an earlier version, whose seal lacks the recipe.
        IntegrityError: It isn't as it was sealed, or a source isn't what its lock says.
        OptikitError: As `optikit run`.
    """
    sealed, values = _sealed(request.directory)
    lock = read_lock(request.directory / LOCK)
    loaded = _recipe(values["recipe"], lock, request)
    store = Store.default()
    with make_progress(request.progress) as progress:
        place = store.staging(NO_KEY)  # swept by the next command if this one is killed
        try:
            for shared in ("downloads", ENVIRONMENTS):
                (place / shared).symlink_to(store.root / shared, target_is_directory=True)
            fresh = Store(place)
            plan = make_plan(
                loaded,
                fresh,
                offline=request.offline,
                device=values["device"],
                extra_targets=request.targets,
                note=progress.note,
            )
            check_lock({str(row["resolved"]): row for row in lock.values()}, plan.sources)
            made = _made(plan, values["steps"], fresh, progress, offline=request.offline)
        finally:
            files.remove_tree(place)
    before = {name: record.sha256 for name, record in sealed.items() if name.startswith(COMPARED)}
    every = sorted(before.keys() | made.keys())
    same = tuple(name for name in every if before.get(name) == made.get(name))
    return Reproduced(same=same, differing=tuple(name for name in every if name not in same))


def _sealed(directory: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the files of an output by name, and what its seal says."""
    found = verify.verify(directory)
    if found.damage:
        raise IntegrityError(f"{directory} is not as it was sealed: {found.damage[0]}", fix=verify.MADE_AGAIN)
    sealed, values = verify.output(directory)
    if "recipe" not in values or LOCK not in sealed.files:
        message = f"the seal of {directory}, written by optikit {values['optikit']}, has neither recipe nor lock"
        raise InputMissingError(message, fix="run its recipe.yaml again, and reproduce that output")
    return sealed.files, values


def _recipe(written: Mapping[str, Any], lock: Mapping[str, Mapping[str, str]], request: Request) -> LoadedRecipe:
    """Return the sealed recipe with every source as it was resolved, so that a branch can't have moved on."""
    resolved = {spec: str(row["resolved"]) for spec, row in lock.items()}
    text = json.dumps(_pinned(written, resolved), ensure_ascii=False)
    return loads(text, request.base / output_dir.RECIPE, known_targets=targets.names(request.targets))


def _pinned(value: Any, resolved: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _pinned(inner, resolved) for name, inner in value.items()}
    if isinstance(value, list):
        return [_pinned(inner, resolved) for inner in value]
    return resolved.get(value, value) if isinstance(value, str) else value


def _made(plan: Plan, steps: list[Mapping[str, Any]], store: Store, progress: Any, *, offline: bool) -> dict[str, str]:
    """Run the steps that made the output; return the sha256 of every file that is compared."""
    last = str(steps[-1]["name"]) if steps else ""
    kept = plan.until(last) if last else plan
    room.require(kept, until(kept.order, last) if last else (), store)
    artifacts = execute(kept, store, progress, Settings(until=last, offline=offline)).artifacts if last else {}
    found = output_dir.layout_digests(kept, artifacts)
    return {name: digest for name, digest in found.items() if name.startswith(COMPARED)}
