"""Peak memory of this process, of its children and of a group of processes, and whom the kernel killed for memory."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

from optikit import host

PROC = Path("/proc")
STATUS = PROC / "self/status"
_UNIT = 1024**2 if sys.platform == "darwin" else 1024
"""Of `ru_maxrss`, per MiB."""


def peak_mib() -> float:
    """Return the highest resident set size of this process, MiB.

    From VmHWM where the kernel has it: getrusage's maximum survives exec, so a child would report its parent's.
    """
    if STATUS.exists():
        return _peak_mib(STATUS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _UNIT


def peak_with_children_mib() -> float:
    """Return the highest resident set size of this process or of any child that it waited for, MiB."""
    return max(peak_mib(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / _UNIT)


def group_peak_mib(group: int) -> float:
    """Return the highest resident set sizes of all processes of a group, summed, MiB; 0 where the kernel doesn't tell.

    Each is that process's own highest, whenever that was: never less than the group ever had at once.
    """
    total = 0.0
    for status in PROC.glob("[0-9]*/status"):
        with suppress(OSError, KeyError):  # it ended meanwhile, or is the kernel's and has no memory
            if os.getpgid(int(status.parent.name)) == group:
                total += _peak_mib(status)
    return total


def kills() -> int:
    """Return how often the kernel killed a process of this control group for memory; 0 where it doesn't tell."""
    told = (path for name in ("memory.events", "memory.oom_control") for path in host.group_files("memory", name))
    path = next(told, None)
    if path is None:
        return 0
    counts = dict(line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return int(counts.get("oom_kill", 0))


def _peak_mib(status: Path) -> float:
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024
