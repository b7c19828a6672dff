"""Looking after a store: read everything again, and make room."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from optikit.errors import IntegrityError
from optikit.store import files, in_use
from optikit.store.keys import is_key
from optikit.store.manifest import NAME, Damage, damages, load, peek
from optikit.store.store import Store

ABANDONED_SECONDS = 14 * 24 * 3600
"""Age at which half-done work counts as given up."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Something in the store that can be made or fetched again.

    Attributes:
        kind: `artifact`, `download`, or rubbish: `corrupt`, `scratch`, `job`, `unfinished`.
        name: Its key, or the sha256 of a downloaded file.
        path: Where it is.
        size_bytes: Bytes of its files.
        used: Time of last use, seconds since 1970.
    """

    kind: str
    name: str
    path: Path
    size_bytes: int
    used: float


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection removed (or would), and what is left, in bytes.

    Attributes:
        in_use: What would have gone if no run worked with it.
    """

    removed: tuple[Entry, ...]
    in_use: tuple[Entry, ...]
    freed_bytes: int
    kept_bytes: int


def entries(store: Store) -> tuple[Entry, ...]:
    """Return every artifact and download, the one used longest ago first."""
    keys = store.keys()
    found = [("artifact", key, store.artifact_path(key)) for key in keys]
    found += [("download", digest, path) for digest, path in (*_downloads(store), *_views(store))]
    rows = [_entry(kind, name, path) for kind, name, path in found]
    return tuple(sorted((row for row in rows if row is not None), key=lambda row: (row.used, row.name)))


def describe(entry: Entry) -> str:
    """Say in a few words what an entry is: the stage that made it, or the file that was fetched."""
    if entry.kind != "artifact":
        return next((path.name for path in sorted(entry.path.iterdir())), "") if entry.path.is_dir() else "text"
    try:
        verb, method, seconds = peek(entry.path)
    except IntegrityError as error:
        return error.message
    return f"{verb} {method}, {seconds:.0f} s to make"


def fsck(store: Store) -> dict[str, list[Damage]]:
    """Read every byte of every artifact and download again; set aside what is damaged, and say what it was."""
    found: dict[str, list[Damage]] = {}
    keys = store.keys()
    for key in keys:
        try:
            broken = damages(store.artifact_path(key), load(store.artifact_path(key)))
        except IntegrityError as error:
            broken = [Damage(NAME, error.message)]
        if broken:
            found[key] = broken
            store.set_aside(store.artifact_path(key), broken)
    for digest, path in _downloads(store):
        if not _is_whole(digest, path):
            found[digest] = [Damage(str(path), "sha256 differs")]
            store.set_aside(path, found[digest])
    return found


def gc(store: Store, keep: set[str], max_bytes: int | None = None, *, dry_run: bool = False) -> Collected:
    """Remove what is broken or abandoned, then the artifacts and downloads used longest ago until the rest fits.

    What a running process has found or made stays, and so does what it works on.

    Args:
        store: The store.
        keep: Keys of artifacts, and sha256 of downloads, that stay.
        max_bytes: Bound on what stays; None removes only what is of no use.
        dry_run: Remove nothing, only say what would go.
    """
    present = entries(store)
    left = sum(entry.size_bytes for entry in present)
    removed, used = [], []
    for entry in present:
        if max_bytes is None or left <= max_bytes:
            break
        if entry.name in keep or store.is_locked(entry.name):
            continue
        if _remove(store, entry.path, dry_run=dry_run):
            removed.append(entry)
            left -= entry.size_bytes
        else:
            used.append(entry)
    removed += [entry for entry in _rubbish(store) if _remove(store, entry.path, dry_run=dry_run)]
    freed = sum(entry.size_bytes for entry in removed)
    return Collected(removed=tuple(removed), in_use=tuple(used), freed_bytes=freed, kept_bytes=left)


def _views(store: Store) -> Iterator[tuple[str, Path]]:
    parent = store.root / "downloads" / "views"
    if parent.is_dir():
        yield from ((path.name, path) for path in sorted(parent.iterdir()) if is_key(path.name))


def _downloads(store: Store) -> Iterator[tuple[str, Path]]:
    for kind in ("files", "texts"):
        parent = store.root / "downloads" / kind
        if parent.is_dir():
            yield from ((path.stem, path) for path in sorted(parent.iterdir()) if is_key(path.stem))


def _is_whole(digest: str, path: Path) -> bool:
    parts = [path] if path.is_file() else list(path.iterdir())
    if not parts:
        return False
    for part in parts:
        with files.open_regular(part) as file:
            if files.sha256(file) != digest:
                return False
    return True


def _entry(kind: str, name: str, path: Path) -> Entry | None:
    try:
        return Entry(kind=kind, name=name, path=path, size_bytes=_size(path), used=path.stat().st_mtime)
    except FileNotFoundError:  # another process removed it meanwhile
        return None


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a directory; ten thousand of them in a fraction of a second."""
    if not path.is_dir():
        return path.stat().st_size
    size, waiting = 0, [os.fspath(path)]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    size += entry.stat(follow_symlinks=False).st_size
    return size


def _rubbish(store: Store) -> list[Entry]:
    found = []
    for kind, directory in (("corrupt", "corrupt"), ("scratch", "scratch"), ("job", "jobs"), ("unfinished", "tmp")):
        for path in sorted((store.root / directory).iterdir()):
            entry = _entry(kind, path.name, path)
            if entry is not None and (kind == "corrupt" or _is_given_up(store, entry)):
                found.append(entry)
    return found


def _is_given_up(store: Store, entry: Entry) -> bool:
    old = time.time() - entry.used > ABANDONED_SECONDS
    if entry.kind == "unfinished":  # of another machine, whose locks can't be seen from here, or of another version
        return old
    if not is_key(entry.name):
        return True
    return (old or store.artifact_path(entry.name).exists()) and not store.is_locked(entry.name)


def _remove(store: Store, path: Path, *, dry_run: bool) -> bool:
    """Remove something that nobody uses, so that no reader ever sees half of it; return whether it is gone."""
    doomed = store.root / "tmp" / f"{path.name}-{os.getpid()}-{time.time_ns()}.gone"
    with in_use.alone(path) as unused:
        if unused and not dry_run:
            try:
                path.rename(doomed)
            except OSError:
                return False
    files.remove_tree(doomed)
    return unused
