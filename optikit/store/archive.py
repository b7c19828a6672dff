"""Artifacts in one tar file, to be taken to another store: checked against their seals when they leave and arrive.

    KEY/artifact.json   the seal, before the files that it names
    KEY/…               the files

Nothing is imported before all of it is there and as sealed. A seal finds damage and truncation; it can't tell whether
whoever wrote the archive made these files as the key says: import what comes from people you trust.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from optikit.errors import CannotCreateError, InputMissingError, IntegrityError, RefusedError, UsageError
from optikit.store import files
from optikit.store.keys import is_key
from optikit.store.manifest import MOST_BYTES, NAME
from optikit.store.store import Artifact, Store

SUFFIX = ".tar"


def export(store: Store, keys: Iterable[str], dest: Path) -> list[Artifact]:
    """Write artifacts to a tar file, which appears whole or not at all.

    Raises:
        IntegrityError: One of them isn't there, or not as sealed.
        RefusedError: A text in one of them holds a credential.
        UsageError: `dest` doesn't end in .tar.
        DiskError, CannotCreateError: It can't be written.
    """
    if dest.suffix != SUFFIX:
        raise UsageError(f"{dest} is no name for an archive", fix=f"end it in {SUFFIX}")
    if not dest.parent.is_dir():
        raise CannotCreateError(f"{dest.parent} is no directory", fix=f"make it: mkdir -p {dest.parent}")
    found = [_whole(store, key) for key in keys]
    need = sum(artifact.manifest.size_bytes for artifact in found)
    partial = dest.with_name(f".{dest.name}.{os.getpid()}.part")
    with files.disk_errors(dest.parent, f"writing {dest}", need=need, fix="choose another place"):
        files.require_free(dest.parent, need, f"writing {dest}")
        try:
            with partial.open("xb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                    for artifact in found:
                        _add(tar, artifact)
                os.fsync(file.fileno())
            partial.replace(dest)
            files.sync_directory(dest.parent)
        finally:
            files.remove_tree(partial)
    return found


def _whole(store: Store, key: str) -> Artifact:
    artifact = store.find(key)
    if artifact is None:
        raise IntegrityError(f"{key[:12]} isn't in {store.root}, or is damaged", fix="run its recipe again")
    store.require_intact(artifact)
    for name in (NAME, *artifact.manifest.files):
        files.require_no_credential(artifact.path / name)
    return artifact


def _add(tar: tarfile.TarFile, artifact: Artifact) -> None:
    """Add an artifact, the seal first; of users, groups and times nothing goes along."""
    for name in (NAME, *sorted(artifact.manifest.files)):
        member = tarfile.TarInfo(f"{artifact.key}/{name}")
        with files.open_regular(artifact.path / name) as file:
            member.size, member.mode = os.fstat(file.fileno()).st_size, 0o600
            tar.addfile(member, file)


def bring_in(store: Store, archive: Path) -> list[Artifact]:
    """Put all artifacts of a tar file in the store, or none.

    Raises:
        InputMissingError: There is no such file.
        IntegrityError: It is no archive of artifacts, is cut short, or differs from its seals.
        DiskError: The disk is full.
    """
    if not archive.is_file():
        raise InputMissingError(f"{archive} is no file", fix="name what `optikit cache export` wrote")
    staged: dict[str, Path] = {}
    try:
        with _problems(archive), files.disk_errors(store.root, f"importing {archive}"):
            files.require_free(store.root, archive.stat().st_size, f"importing {archive}")
            with files.open_regular(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for key, name, content in _members(tar):
                    if key not in staged:
                        staged[key] = store.staging(key)
                    _write(staged[key] / name, content)
                _require_end(tar, archive)
            for key, directory in staged.items():
                store.require_sealed(key, directory)
        if not staged:
            raise IntegrityError(f"{archive} holds no artifact", fix="name what `optikit cache export` wrote")
        return [store.adopt(key, directory) for key, directory in staged.items()]
    finally:
        for directory in staged.values():
            files.remove_tree(directory)


@contextmanager
def _problems(archive: Path) -> Iterator[None]:
    fix = "copy it again from where it was exported"
    try:
        yield
    except (tarfile.TarError, EOFError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise IntegrityError(f"{archive} is damaged or no archive: {error}", fix=fix) from error
    except RefusedError as error:
        raise IntegrityError(f"{archive}: {error.message}", fix=fix) from error


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, IO[bytes]]]:
    """Yield key, name and content of each file; anything but plain files below a key is refused."""
    for member in tar:
        key, _, name = member.name.partition("/")
        content = tar.extractfile(member) if _is_ours(member, key, name) else None
        if content is None:
            message = f"{member.name!r} is no file of an artifact"
            raise tarfile.ReadError(message)
        yield key, name, content


def _is_ours(member: tarfile.TarInfo, key: str, name: str) -> bool:
    """Return whether a member is a plain file below a key, and a seal of a size that one has."""
    path = PurePosixPath(name)
    inside = name == str(path) != "." and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    plain = member.isreg() and not member.issparse()
    return plain and inside and is_key(key) and (name != NAME or member.size <= MOST_BYTES)


def _require_end(tar: tarfile.TarFile, archive: Path) -> None:
    """Refuse an archive whose end, two blocks of zeros, is missing: it was cut between two files."""
    with files.open_regular(archive) as file:
        file.seek(tar.offset)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            message = "it is cut short"
            raise tarfile.ReadError(message)


def _write(path: Path, content: IO[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("xb") as file:
        while chunk := content.read(files.CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
