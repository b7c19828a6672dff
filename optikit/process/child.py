"""DOCSTRING optikit.process.child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from optikit.errors import OptikitError, OutOfMemoryError, StageFailedError


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that a killed run leaves nothing behind (Linux)."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


GRACE_SECONDS = 5.0
"""How long an interrupted step may take to end by itself before it is killed."""


MOST_LOG_BYTES = 64 * 2**20
"""Beyond this a log is begun anew: a library that prints in a loop must not fill the disk."""


LOG_TAIL_BYTES = 4096
"""How much of a dead process's log is searched for a cause."""


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child and everything it started: politely, then not."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        if child.poll() is None:
            _signal_group(child.pid, number)
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
    _signal_group(child.pid, signal.SIGKILL)  # grandchildren that outlived it


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _bound(log: Path) -> None:
    """Begin a log anew that has grown too large."""
    if log.stat().st_size > MOST_LOG_BYTES:
        os.truncate(log, 0)
        with log.open("ab") as file:
            file.write(f"(more than {MOST_LOG_BYTES >> 20} MiB before this were cut off)\n".encode())


def _oom_kills() -> int:
    """Return how often the kernel killed a process of this control group for memory; 0 where it doesn't tell."""
    path = Path("/sys/fs/cgroup/memory.events")
    if not path.exists():
        return 0
    counts = dict(line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return int(counts.get("oom_kill", 0))


def _death(step: str, returncode: int, log: Path, *, oom: bool) -> OptikitError:
    """Return the error for a child that died without a response."""
    if -returncode == signal.SIGKILL:
        certain = "the kernel ended it for memory" if oom else "something ended it with SIGKILL, most often for memory"
        fix = "fewer or shorter calibration samples, or a machine with more memory"
        return OutOfMemoryError(f"{step}: {certain}", fix=fix)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return StageFailedError(f"{step}: its process crashed with {name}", fix=f"the log has more: {log}")
    tail = b""
    if log.exists():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            tail = file.read()
    if b"MemoryError" in tail:
        fix = "give the run more memory, or fewer calibration samples"
        return OutOfMemoryError(f"{step}: its process had no memory left to say so", fix=fix)
    return StageFailedError(f"{step}: its process ended with exit code {returncode} and no response", fix=f"see {log}")
