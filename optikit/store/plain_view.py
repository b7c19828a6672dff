"""A model directory without the Python that its settings name, beside the one that was published.

DeepSeek, Phi-3, Falcon, MPT and others carry `auto_map` beside a `model_type` that transformers has classes for.
Nothing here imports what it names, but a library of an environment would, if it trusts code by default. So every step
sees a directory whose settings don't have the key; the files of the model are hard links where the file system has
them, and copies elsewhere. Code that comes with a model isn't part of it.

downloads/views/KEY/NAME      KEY says which files these are, by path, size and time
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.fileio import file_sha256
from optikit.models import headers, intake, strict_json
from optikit.store import files
from optikit.store.keys import cache_key

if TYPE_CHECKING:
    from optikit.store.store import Store

DROPPED = "auto_map"


def of(directory: Path, names: Sequence[str], store: Store) -> Path:
    """Return a directory with these files of a model and none that names code; itself where none does.

    Args:
        directory: As it was published.
        names: What goes with the model (`intake.model_files`).
        store: Where the view is kept.

    Raises:
        IntegrityError: Settings aren't a JSON object.
    """
    changed = {name: _without(found) for name, found in _settings(directory, names) if _names_code(found)}
    if not changed:
        return directory
    key = cache_key(view=[[name, *_stamp(directory / name)] for name in names], of=str(directory.absolute()))
    place = store.root / "downloads" / "views" / key
    while not (store.hold(place) and place.is_dir()):
        _publish(_made(directory, names, changed, store.staging(key)), place)
    with suppress(OSError):
        os.utime(place)  # last use, for the garbage collection
    return place


def digests(view: Path, directory: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Return the sha256 of a view's files from those of the directory that it is a view of."""
    if view == directory:
        return dict(known)
    return {name: file_sha256(view / name) if _has_settings(name) else digest for name, digest in known.items()}


def _has_settings(name: str) -> bool:
    return name.endswith("config.json")


def _settings(directory: Path, names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    chosen = filter(_has_settings, names)
    return [(name, strict_json.read_object(directory / name, most_bytes=intake.MOST_SETTINGS)) for name in chosen]


def _names_code(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get(DROPPED)) or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key != DROPPED}
    return [_without(inner) for inner in value] if isinstance(value, list) else value


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _made(directory: Path, names: Sequence[str], changed: Mapping[str, Any], dest: Path) -> Path:
    """Write a view into an empty directory, and return that; of headers alone it says that they are."""
    marks = [headers.HOLLOW] if (directory / headers.HOLLOW).is_file() else []
    with files.disk_errors(dest, f"store {dest.parent.parent}"):
        for name in (*names, *marks):
            (dest / name).parent.mkdir(mode=0o700, exist_ok=True)
            if name in changed:
                (dest / name).write_text(json.dumps(changed[name], indent=1) + "\n", encoding="utf-8")
            else:
                _link((directory / name).resolve(), dest / name)
    return dest


def _publish(made: Path, place: Path) -> None:
    place.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        made.rename(place)
    except OSError:  # another process was first
        files.remove_tree(made)
        if not place.is_dir():
            raise


def _link(source: Path, dest: Path) -> None:
    try:
        os.link(source, dest)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, dest)
