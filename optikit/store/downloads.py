"""Downloaded files, kept by sha256, and what is known of where they came from.

downloads/files/SHA256/NAME   one file, under its own name (tools look at the suffix)
downloads/texts/SHA256.txt    a text cut to what a recipe names
downloads/index/KEY.json      which file a source stood for
downloads/views/KEY/          see `plain_view`
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from optikit.fileio import read_regular
from optikit.store import files
from optikit.store.keys import is_key, valid
from optikit.store.manifest import Damage

if TYPE_CHECKING:
    from optikit.store.store import Store


def find(store: Store, digest: str) -> Path | None:
    """Return a kept file if it is there and whole; a damaged one is set aside and counts as absent."""
    if not is_key(digest):
        return None
    directory = store.root / "downloads" / "files" / digest
    present = sorted(directory.iterdir()) if store.hold(directory) and directory.is_dir() else []
    if len(present) != 1:
        return None
    if not present[0].is_file() or store.digest_file(present[0]) != digest:
        store.set_aside(directory, [Damage(present[0].name, "sha256 differs")])
        return None
    with suppress(OSError):
        os.utime(directory)  # last use, for the garbage collection
    return present[0]


def keep(store: Store, file: Path) -> tuple[str, Path]:
    """Move a file from a staging directory, where it must be alone, to where it is kept; return (sha256, path)."""
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", file.name).lstrip(".") or "file"
    named = file.rename(file.with_name(name))
    with named.open("rb") as opened:
        os.fsync(opened.fileno())
    digest = store.digest_file(named)
    kept = find(store, digest)
    if kept is not None:
        return digest, kept
    dest = store.root / "downloads" / "files" / digest
    dest.parent.mkdir(mode=0o700, exist_ok=True)
    files.remove_tree(dest)
    named.parent.rename(dest)
    files.sync_directory(dest.parent)
    return digest, dest / name


def find_text(store: Store, digest: str) -> Path | None:
    """Return a kept text if it is there and whole; a damaged one is set aside and counts as absent."""
    path = store.root / "downloads" / "texts" / f"{digest}.txt"
    if not is_key(digest) or not store.hold(path):
        return None
    if path.is_symlink() or not path.is_file() or store.digest_file(path) != digest:
        store.set_aside(path, [Damage(path.name, "sha256 differs")])
        return None
    return path


def keep_text(store: Store, content: bytes, digest: str) -> Path:
    """Keep a text under its sha256; return where."""
    path = store.root / "downloads" / "texts" / f"{valid(digest)}.txt"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    files.write_whole(path, content)
    while not store.hold(path):  # collected before it was held
        files.write_whole(path, content)
    return path


def remember(store: Store, key: str, row: Mapping[str, str]) -> None:
    """Write down which file a source stands for."""
    path = store.root / "downloads" / "index" / f"{valid(key)}.json"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.is_dir():
        files.remove_tree(path)
    files.write_whole(path, json.dumps(dict(row), indent=1).encode())


def recall(store: Store, key: str, *names: str) -> dict[str, str] | None:
    """Return what was remembered of a source, or None unless all of `names` were."""
    path = store.root / "downloads" / "index" / f"{valid(key)}.json"
    try:
        loaded = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(name), str) for name in names):
        return None
    return loaded
