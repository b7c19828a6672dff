"""Processes watched from outside, and a disk that is really full."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

WRITE_PID = "import os, pathlib, sys, time; pathlib.Path({path!r}).write_text(str(os.getpid()))\n"
SLEEPS = WRITE_PID + "time.sleep(600)\n"


def is_gone(pid: int) -> bool:
    """Return whether a process has ended; one that nobody waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    """Wait until something holds; return whether it does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def written_pid(path: Path) -> int:
    """Wait until a process has written its id to a file, and return it."""
    assert wait_for(lambda: path.is_file() and path.read_text().strip())
    return int(path.read_text())


@contextmanager
def small_disk(mount: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
