"""sha256 of large files, remembered: one whose size, times and inode are unchanged isn't read again.

What `git` does with its index, for the same reason: a warm run must not read gigabytes. It can't notice a bit that the
disk lost, so whoever uses or ships such a file reads it anew (`Digests.read`). A file that was written within
the clock's step before it was hashed may change again without changing its times, so such an entry isn't trusted.
The memory is a cache with a checksum: lost, torn, refused or damaged, it costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from optikit.errors import RefusedError
from optikit.fileio import open_regular
from optikit.store import files
from optikit.store.files import sha256
from optikit.store.keys import is_key

STEP_NS = 20_000_000
"""Coarsest step of a local file system's clock, in nanoseconds, with room."""
MOST_ENTRIES = 20_000
WORTH_REMEMBERING = 2**24
"""Bytes below which a file is read each time: a disk may lose a bit without changing size or times."""


def _identity(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


class Digests:
    """sha256 by path, kept in one JSON file; `warn` is told when that is damaged."""

    def __init__(self, path: Path, *, warn: Callable[[str], None] = lambda _: None) -> None:
        self._path = path
        self._warn = warn
        self._entries: dict[str, list[Any]] | None = None
        self._new: dict[str, list[Any]] = {}

    def of(self, path: Path) -> str:
        """Return the sha256, in hex, of a file's bytes (links are followed), reading them only where needed."""
        path = path.absolute()
        return self._remembered(path, path.stat()) or self.read(path)

    def _remembered(self, path: Path, stat: os.stat_result) -> str:
        entry = self._new.get(str(path)) or self._known().get(str(path))
        unchanged = entry is not None and entry[:4] == _identity(stat) and stat.st_size >= WORTH_REMEMBERING
        return str(entry[4]) if entry is not None and unchanged else ""

    def known(self, path: Path) -> str:
        """Return the sha256 of a file without reading a large one: "" where it isn't remembered."""
        path = path.absolute()
        stat = path.stat()
        entry = self._remembered(path, stat)
        return entry or ("" if stat.st_size >= WORTH_REMEMBERING else self.read(path))

    def read(self, path: Path) -> str:
        """Return the sha256, in hex, of a file's bytes as they are on the disk now."""
        path = path.absolute()
        started = time.time_ns()
        with open_regular(path) as file:
            before = os.fstat(file.fileno())
            digest = sha256(file)
            after = os.fstat(file.fileno())
        settled = max(after.st_mtime_ns, after.st_ctime_ns) < started - STEP_NS
        if _identity(before) == _identity(after) and settled and after.st_size >= WORTH_REMEMBERING:
            self._new[str(path)] = [*_identity(after), digest]
        return digest

    def moved(self, source: Path, dest: Path) -> None:
        """Keep what was learnt of the files in a directory that has been renamed."""
        prefix = f"{source.absolute()}{os.sep}"
        for path in [path for path in self._new if path.startswith(prefix)]:
            self._new[str(dest.absolute() / path.removeprefix(prefix))] = self._new.pop(path)

    def save(self) -> None:
        """Write what was learnt, together with what others wrote meanwhile."""
        if not self._new:
            return
        entries = self._read() | self._new
        kept = dict(list(entries.items())[-MOST_ENTRIES:])
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        with suppress(OSError):
            partial.write_text(json.dumps({"sha256": _checksum(kept), "entries": kept}), encoding="utf-8")
            partial.replace(self._path)
        self._entries, self._new = kept, {}

    def _known(self) -> dict[str, list[Any]]:
        if self._entries is None:
            self._entries = self._read()
        return self._entries

    def _read(self) -> dict[str, list[Any]]:
        try:
            with files.open_regular(self._path) as file:
                loaded = json.loads(file.read())
            entries: dict[str, list[Any]] = loaded["entries"]
            if loaded["sha256"] == _checksum(entries) and all(map(_is_row, entries.values())):
                return entries
            why = "its checksum differs"
        except FileNotFoundError:
            return {}
        except (OSError, RefusedError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"
        files.remove_tree(self._path)
        self._warn(f"{self._path} was damaged ({why}): files are read again")
        return {}


def _checksum(entries: dict[str, list[Any]]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _is_row(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 5:
        return False
    return all(isinstance(number, int) for number in row[:4]) and isinstance(row[4], str) and is_key(row[4])
