"""Leases: of all processes on all machines that share a store, one at a time works on a key.

    ROOT/locks/KEY.lock      locked by its holder with flock
               KEY.lease/N   who holds it, the highest N counts: host, kernel, process, a count that grows, or released

The kernel's lock is exact and ends with its holder, but reaches only as far as the file system lets it:

    ext4, xfs, btrfs, tmpfs   all processes of one kernel, in containers, too
    NFS (and EFS)             all machines, if not mounted with nolock or local_lock; unknown to whoever exports it
    Lustre, FUSE, buckets     often this machine alone, or nothing

So a lease is written beside it, which needs no lock: only that one of several that create a file succeeds, and that a
directory lists what was created before. A holder counts on every `HEARTBEAT_SECONDS`. Who finds the count unchanged for
`EXPIRY_SECONDS` of his own clock takes over with the next number; clocks are never compared. Of the dead on his own
kernel, whose lock he just got, he knows at once. A holder that was held up for so long, or can't write, finds that out
before others may take over, and stops; what it made until then is kept, as after any death.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from optikit.store import fault_points, files

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 45.0
"""Longest pause of a holder. Far more than a file server takes to fail over, far less than a step is worth."""
LONG_SILENT_SECONDS = 20 * EXPIRY_SECONDS
"""By the file server's clock: who only looks, and doesn't wait, takes such a holder for dead."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class LeaseLostError(Exception):
    """Another process may have taken over: what is being made belongs to it now."""


class KernelLock:
    """The lock of a file, held as long as this object keeps it open; where there are no locks, it excludes nobody."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, -1
        self.works = True

    def take(self) -> bool:
        """Return whether nobody else on this kernel has it now."""
        if self._descriptor < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
        try:
            fault_points.reach("lock")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self.works = False
                return True
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def let_go(self) -> None:
        """Free it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Lease:
    """The lease in a directory: `take` it, again and again until it succeeds, and `give_back`.

    Args:
        directory: Of this lease alone; made where it is missing.
        heartbeat_s: Seconds between two signs of life.
        expiry_s: Seconds without any after which others take over.
    """

    def __init__(
        self, directory: Path, *, heartbeat_s: float = HEARTBEAT_SECONDS, expiry_s: float = EXPIRY_SECONDS
    ) -> None:
        self._directory, self._heartbeat_s, self._expiry_s = directory, heartbeat_s, expiry_s
        self._seen: tuple[int, bytes] = (0, b"")
        self._seen_at = 0.0
        self._number = 0
        self._count = 0
        self._beaten = 0.0
        self._lost = False
        self._ourselves = _ourselves()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, *, alone_here: bool) -> bool:
        """Return whether this process holds it now.

        Args:
            alone_here: Every holder of this lease on this kernel has its `KernelLock`, and this process has it now.
        """
        self._directory.mkdir(mode=0o700, exist_ok=True)
        highest = _highest(self._directory)
        if highest and not self._is_free(highest, alone_here=alone_here):
            return False
        number, self._beaten = highest + 1, time.monotonic()
        try:
            _write(self._directory / str(number), self._content(), os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        if _highest(self._directory) != number:  # others came between, and have gone further
            _remove(self._directory / str(number))
            return False
        for older in _numbers(self._directory):
            if older < number:
                _remove(self._directory / str(older))
        self._number = number
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return True

    def require(self) -> None:
        """Refuse to go on if others may have taken over.

        Raises:
            LeaseLostError: They may.
        """
        if self._lost or time.monotonic() - self._beaten > 0.8 * self._expiry_s:
            raise LeaseLostError

    def give_back(self) -> None:
        """Let others have it at once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._number and not self._lost:
            with suppress(OSError):
                _write(self._directory / str(self._number), _padded({"released": True}))

    def holder(self) -> str:
        """Describe who holds it, as far as that is known."""
        try:
            return described(_read(self._directory / str(_highest(self._directory))))
        except FileNotFoundError:  # it has the kernel's lock, and is about to write this
            return described(b"")

    def _is_free(self, highest: int, *, alone_here: bool) -> bool:
        """Return whether the one that holds the highest number gave it back, is dead, or was silent for too long."""
        content = _read(self._directory / str(highest))
        who = _parsed(content)
        if who.get("released") or (alone_here and who.get("kernel") == kernel()):
            return True
        now = time.monotonic()
        if (highest, content) != self._seen:
            self._seen, self._seen_at = (highest, content), now
        return now - self._seen_at > self._expiry_s

    def _content(self) -> bytes:
        self._count += 1
        return _padded({**self._ourselves, "count": self._count})

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_s):
            begun = time.monotonic()
            try:
                if _highest(self._directory) == self._number:
                    _write(self._directory / str(self._number), self._content())
                    self._beaten = begun
                    continue
            except FileNotFoundError:
                pass
            except OSError:  # no room, no server: others decide when that has lasted too long
                continue
            self._lost = True
            return


def is_held(directory: Path, *, alone_here: bool) -> bool:
    """Return whether anybody holds a lease, without touching it."""
    try:
        highest = _highest(directory)
        path = directory / str(highest)
        who = _parsed(_read(path))
        if not highest or who.get("released") or (alone_here and who.get("kernel") == kernel()):
            return False
        probe = directory / f"now-{os.getpid()}"  # the file server's clock, which wrote the other time, too
        probe.touch()
        age = probe.stat().st_mtime - path.stat().st_mtime
        probe.unlink()
    except FileNotFoundError:
        return False
    return age < LONG_SILENT_SECONDS


@cache
def kernel() -> str:
    """Return what tells this machine, since it was started, from all others; its containers count as others, too."""
    boot = _BOOT.read_text(encoding="ascii").strip() if _BOOT.exists() else ""
    return f"{boot}@{os.uname().nodename}"


def described(content: bytes) -> str:
    """Say who wrote the content of a lease."""
    who = _parsed(content)
    try:
        return f"process {who['pid']} on {who['host']} (since {who['since']})"
    except KeyError:
        return "another process"


def _ourselves() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": os.uname().nodename, "since": since, "kernel": kernel()}


def _numbers(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _highest(directory: Path) -> int:
    return max(_numbers(directory), default=0)


def _padded(values: Mapping[str, Any]) -> bytes:
    """Return values as JSON of one length: a sign of life needs no room on the disk."""
    return json.dumps(values).encode().ljust(256) + b"\n"


def _write(path: Path, content: bytes, how: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | how, 0o600)
    try:
        os.pwrite(descriptor, content, 0)
        if len(content) < os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        with files.open_regular(path) as file:
            return file.read(4096)
    except OSError:
        return b""


def _parsed(content: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:  # half-written: somebody holds it
        return {}
    return found if isinstance(found, dict) else {}


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
