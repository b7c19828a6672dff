"""Making room: environments whose lock has changed, and what a killed build left."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optikit.environments.definition import Definition, find, names
from optikit.environments.environment import Environment, home, locate

if TYPE_CHECKING:
    from optikit.store.store import Store


@dataclass(frozen=True)
class Removed:
    """A directory, its bytes, and what became of it: `removed`, `would remove`, or `in use`."""

    name: str
    size_bytes: int
    what: str


def collect(
    store: Store, *, everything: bool = False, dry_run: bool = False, root: Path | None = None
) -> list[Removed]:
    """Remove the environments that no definition asks for, or that aren't complete; with `everything`, all.

    What somebody uses or builds stays: its use is a shared lock, which its removal needs for itself alone.
    """
    current = {found.path: found for found in (locate(find(name, root), store.root) for name in names(root))}
    rows = []
    for path in sorted(home(store.root).iterdir()):
        if not path.is_dir():
            continue
        known = current.get(path)
        if known is not None and known.state() == "ready" and not everything:
            continue
        environment = known or Environment(_nameless(path), path)
        bytes_ = size(path)
        if dry_run:
            rows.append(Removed(path.name, bytes_, "would remove"))
        else:
            rows.append(Removed(path.name, bytes_, "removed" if environment.remove() else "in use"))
    return rows


def _nameless(path: Path) -> Definition:
    """Return a definition for a directory that none stands behind any more."""
    return Definition(name=path.name, summary="", python="", lock="", imports=())


def size(path: Path) -> int:
    """Return the bytes of all files below a directory, 0 where there is none."""
    return sum((Path(parent) / name).lstat().st_size for parent, _, files in os.walk(path) for name in files)
