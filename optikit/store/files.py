"""Files the careful way: never through a symbolic link, on disk before they count, and with a name for a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from optikit import text
from optikit.errors import CannotCreateError, DiskError, IntegrityError, RefusedError
from optikit.store import fault_points

CHUNK = 1 << 20
GC_FIX = "free some space, for example with `optikit cache gc`, and run again"
TEXTS = (".yaml", ".json", ".md", ".html", ".lock", ".txt", ".jinja")
MOST_SEARCHED = 16 * 2**20
"""Larger text files, tokenizers above all, aren't searched for credentials."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def in_units(size: int) -> str:
    """Write a number of bytes for people.

    >>> in_units(512), in_units(2048), in_units(98362432), in_units(3 * 2**30)
    ('512 B', '2.0 KiB', '93.8 MiB', '3.00 GiB')
    """
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    if size >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**10:.1f} KiB" if size >= 2**10 else f"{size} B"


def free_bytes(path: Path) -> int:
    """Return what is free on the file system of a path, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(path: Path, need: int, what: str) -> None:
    """Refuse to begin writing `need` bytes where they don't fit.

    Raises:
        DiskError: Saying what is needed and what is there.
    """
    have = free_bytes(path)
    if need > have:
        raise DiskError(f"{what} needs {in_units(need)}, and {path} has {in_units(have)} free", fix=GC_FIX)


@contextmanager
def disk_errors(
    path: Path,
    what: str,
    *,
    need: int = 0,
    fix: str = "make it writable, or point OPTIKIT_HOME to a directory that is",
) -> Iterator[None]:
    """Turn a system error while writing below `path` into one that says what to do; `fix` is for what is forbidden.

    Raises:
        DiskError: Full disk, quota, file size limit, failing device.
        CannotCreateError: No permission, read-only file system.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            needed = f" (needs {in_units(need)})" if need else ""
            have = in_units(free_bytes(path))
            message = f"{what}: {error.strerror}{needed}; {path} has {have} free"
            raise DiskError(message, fix=GC_FIX) from error
        if error.errno == errno.EIO:
            raise DiskError(f"{what}: {error}", fix="the device below it fails: try another disk") from error
        if error.errno in _FORBIDDEN:
            raise CannotCreateError(f"{what}: {error.strerror}: {error.filename or path}", fix=fix) from error
        raise


def walk(directory: Path) -> dict[str, os.stat_result]:
    """Return every regular file below a directory: relative path with `/` → stat, sorted.

    Raises:
        RefusedError: At a symbolic link, socket, pipe or device: a link may lead anywhere.
    """
    found: dict[str, os.stat_result] = {}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(directory / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(name + "/")
                elif entry.is_file(follow_symlinks=False):
                    found[name] = entry.stat(follow_symlinks=False)
                else:
                    message = f"{directory / name} is not a regular file"
                    raise RefusedError(message, fix="only plain files may be stored")
    return dict(sorted(found.items()))


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading that is a regular file itself, not a link to one.

    Raises:
        RefusedError: If it is anything else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RefusedError(f"{path} is a symbolic link", fix="only plain files may be stored") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RefusedError(f"{path} is not a regular file", fix="only plain files may be stored")
    return os.fdopen(descriptor, "rb")


def require_own(path: Path) -> None:
    """Refuse a directory that somebody else owns or may write to: what lies there is believed, some of it executed.

    Raises:
        RefusedError: Naming owner or mode, with the command that mends it.
    """
    found = path.stat()
    if found.st_uid != os.geteuid():
        fix = "point OPTIKIT_HOME to a directory of your own"
        raise RefusedError(f"{path} belongs to user {found.st_uid}, and this is user {os.geteuid()}", fix=fix)
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "anybody" if found.st_mode & stat.S_IWOTH else "every member of its group"
        raise RefusedError(f"{who} may write to {path}", fix=f"chmod go-w {path}")


def require_no_credential(path: Path) -> None:
    """Refuse a text that holds what looks like a credential, before it leaves this machine.

    Raises:
        RefusedError: Naming the file.
    """
    if path.suffix not in TEXTS or path.stat().st_size > MOST_SEARCHED:
        return
    content = path.read_text(encoding="utf-8", errors="replace")
    if text.redact(content) != content:
        message = f"{path} holds what looks like a password or a token"
        raise RefusedError(message, fix="take it out of the recipe, and run it again")


def sha256(file: BufferedReader) -> str:
    """Return the sha256, in hex, of the rest of a file."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make the names in a directory and in all directories below survive a power cut."""
    for parent, _, _ in os.walk(directory, topdown=False):
        sync_directory(Path(parent))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that readers, and a power cut, see all of it or none."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    half = len(content) // 2
    try:
        with partial.open("wb") as file:
            file.write(content[:half])
            file.flush()
            fault_points.reach("mid_write")
            file.write(content[half:])
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_directory(path.parent)


def copy(source: Path, dest: Path, *, digest: str) -> None:
    """Copy one file, bytes and nothing else, and check on the way that they are the promised ones.

    Raises:
        IntegrityError: If the source isn't what `digest`, a sha256 in hex, says.
    """
    seen = hashlib.sha256()
    with open_regular(source) as reading, dest.open("xb") as writing:
        while chunk := reading.read(CHUNK):
            seen.update(chunk)
            writing.write(chunk)
            fault_points.reach("mid_write")
        writing.flush()
        os.fsync(writing.fileno())
    if seen.hexdigest() != digest:
        raise IntegrityError(f"{source} changed: sha256 {seen.hexdigest()}, expected {digest}", fix="run again")


def remove_tree(path: Path) -> None:
    """Remove a directory or file if it is there; what can't be removed is left for the next sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
