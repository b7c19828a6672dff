"""What is in use may not be removed: kernel locks on the files and directories of a store themselves.

Whoever reads or writes an entry holds it shared; whoever wants to remove it has to get it for itself first. Nothing is
written for that, so it holds on a full disk, and the kernel lets go when the holder ends, however it ends and whether
or not anybody can see its process: another container has process ids of its own.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Holder:
    """The entries that one store object has handed out; let go when it is collected, or its process ends."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], int] = {}
        """Open file by device and inode: a rename changes nothing."""
        weakref.finalize(self, _close, self._held)

    def hold(self, path: Path) -> bool:
        """Keep others from removing a file or directory; return whether it is there."""
        while True:
            try:
                descriptor = _open(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            except OSError:  # a link, or unreadable: whoever reads it will say so
                return True
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for one who looks whether anybody holds it
            kept = _identity(descriptor)
            if not _is_at(descriptor, path):  # removed, or replaced, meanwhile
                os.close(descriptor)
            elif kept in self._held:
                os.close(descriptor)
                return True
            else:
                self._held[kept] = descriptor
                return True


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Get a file or directory for oneself as long as the block takes; False where anybody holds it, or it is gone."""
    try:
        descriptor = _open(path)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    except OSError:  # a link, or unreadable: nobody holds it
        yield True
        return
    try:
        yield _is_free(descriptor) and _is_at(descriptor, path)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(OSError):
        found = path.lstat()
        return (found.st_dev, found.st_ino) == _identity(descriptor)
    return False


def _close(held: dict[tuple[int, int], int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)
