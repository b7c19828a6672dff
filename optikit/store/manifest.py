"""The seal of a directory: `artifact.json`, written last, naming every file with its size and sha256.

A directory without it is unfinished; one that differs from it is damaged. The seal covers itself: `self_sha256` is the
digest of everything else in it, so that a flipped bit in a figure is damage, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from optikit.errors import IntegrityError, RefusedError
from optikit.store import fault_points, files
from optikit.store.keys import is_key

T = TypeVar("T")
NAME = "artifact.json"
SCHEMA_VERSION = 2
UNSEALED_VERSION = 1
"""Seals of this version don't cover themselves, and those of outputs don't cover the reports; they are still read."""
SELF = "self_sha256"
MOST_BYTES = 64 * 2**20
"""A larger artifact.json is refused before it is parsed."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 in hex of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a sealed directory holds and how it came to be.

    Attributes:
        key: Cache key of the step that wrote it; "" for directories outside the store.
        verb, method, backend, options: The stage.
        parent: Key of the artifact that it was made from, or "".
        inputs: Other artifacts by role → key.
        traits: What the directory is, sorted.
        facts: What the stage found out.
        seconds, peak_memory_mib: What the stage took.
        versions: Libraries that decide the result.
        files: Relative path → size and sha256, filled in by sealing.
        created: UTC, ISO 8601, filled in by sealing where empty.
    """

    key: str = ""
    verb: str = ""
    method: str = ""
    backend: str = "optikit"
    options: Mapping[str, Any] = field(default_factory=dict)
    parent: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    traits: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mib: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    created: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, artifact.json itself left out."""
        return sum(record.size for record in self.files.values())


@dataclass(frozen=True)
class Artifact:
    """A sealed directory in the store."""

    key: str
    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Damage:
    """One file that isn't what the manifest says; `unlisted`: the manifest says nothing of it."""

    path: str
    what: str
    unlisted: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def _read_digest(path: Path) -> str:
    with files.open_regular(path) as file:
        return files.sha256(file)


def seal(directory: Path, manifest: Manifest, *, digest: Callable[[Path], str] = _read_digest) -> Manifest:
    """Put every file of a directory on disk for good, then write artifact.json last; return the finished manifest.

    Args:
        directory: What to seal; an artifact.json already there is replaced.
        manifest: Everything but the files.
        digest: How to get the sha256 of a file.

    Raises:
        RefusedError: If the directory holds anything but plain files and directories.
    """
    records = {}
    for name in files.walk(directory):
        if name == NAME:
            continue
        with files.open_regular(directory / name) as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        records[name] = FileRecord(size, digest(directory / name))
    files.sync_tree(directory)
    created = manifest.created or datetime.now(UTC).isoformat(timespec="seconds")
    sealed = replace(manifest, files=records, created=created)
    fault_points.reach("before_manifest")
    files.write_whole(directory / NAME, dumps(asdict(sealed)).encode())
    return sealed


def dumps(values: Mapping[str, Any]) -> str:
    """Return the text of a seal that covers itself."""
    plain = json.loads(json.dumps(values, allow_nan=False))  # as it will be read: every name is a text
    return json.dumps({**plain, SELF: _own_digest(plain)}, indent=1, sort_keys=True)


def _own_digest(values: Mapping[str, Any]) -> str:
    """Return the sha256 of everything in a seal but this digest."""
    rest = {name: value for name, value in values.items() if name != SELF}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load(directory: Path) -> Manifest:
    """Read artifact.json; errors as of `read`."""
    return read(directory)[0]


def read(directory: Path) -> tuple[Manifest, dict[str, Any]]:
    """Read artifact.json; return what it says of files and of the stage, and all of it.

    Raises:
        IntegrityError: If it is missing, torn, changed after it was sealed, or names files outside the directory.
    """
    return _readable(directory, lambda loaded: (_parse(loaded), loaded))


def peek(directory: Path) -> tuple[str, str, float]:
    """Return verb, method and seconds of a stage without checking the seal: lists show thousands of them.

    Raises:
        IntegrityError: If there is none to read.
    """
    return _readable(directory, lambda loaded: (loaded["verb"], loaded["method"], float(loaded["seconds"])))


def _readable(directory: Path, use: Callable[[Any], T]) -> T:
    path = directory / NAME
    fix = "what it describes is unfinished or damaged: make it again"
    try:
        with files.open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise IntegrityError(f"{path} is larger than {files.in_units(MOST_BYTES)}", fix=fix)
        return use(json.loads(content))
    except FileNotFoundError:
        raise IntegrityError(f"{directory} has no {NAME}", fix=fix) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path} can't be read: {error}", fix=fix) from error
    except RefusedError as error:
        raise IntegrityError(error.message, fix=fix) from error


def _parse(loaded: Any) -> Manifest:
    version = loaded["schema_version"]
    if version not in (UNSEALED_VERSION, SCHEMA_VERSION):
        msg = f"schema_version {version!r}, and this optikit reads {SCHEMA_VERSION}"
        raise ValueError(msg)
    if version != UNSEALED_VERSION and loaded[SELF] != _own_digest(loaded):
        msg = "it was changed after it was sealed"
        raise ValueError(msg)
    known = {f.name for f in fields(Manifest)}
    values = {name: value for name, value in loaded.items() if name in known}
    values["files"] = {name: _record(name, row) for name, row in loaded["files"].items()}
    values["traits"] = tuple(loaded.get("traits", ()))
    return Manifest(**values)


def _record(name: str, row: Mapping[str, Any]) -> FileRecord:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
        msg = f"file name {name!r} leaves the directory"
        raise ValueError(msg)
    size, digest = row["size"], row["sha256"]
    if type(size) is not int or size < 0 or not isinstance(digest, str) or not is_key(digest):
        msg = f"{name!r} has no size and sha256"
        raise ValueError(msg)
    return FileRecord(size, digest)


def damages(
    directory: Path,
    manifest: Manifest,
    *,
    contents: Callable[[str], bool] | bool = True,
    digest: Callable[[Path], str] = _read_digest,
) -> list[Damage]:
    """Compare a directory with its manifest; return every difference.

    Args:
        directory: What was sealed.
        manifest: Its seal.
        contents: Compare sha256 too, not only names and sizes; or of which files.
        digest: How to get the sha256 of a file.
    """
    try:
        present = files.walk(directory)
    except RefusedError as error:
        return [Damage(str(directory), error.message)]
    present.pop(NAME, None)
    found = [Damage(name, "missing") for name in manifest.files if name not in present]
    found += [Damage(name, "not in the manifest", unlisted=True) for name in present if name not in manifest.files]
    compared = contents if callable(contents) else lambda _: contents
    for name in manifest.files.keys() & present.keys():
        record, size = manifest.files[name], present[name].st_size
        if size != record.size:
            found.append(Damage(name, f"{size} bytes, expected {record.size}"))
        elif compared(name) and digest(directory / name) != record.sha256:
            found.append(Damage(name, "sha256 differs"))
    return sorted(found, key=lambda damage: damage.path)
