"""Peak memory of this process, and of a group of processes."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
STATUS = PROC / "self/status"


def peak_mib() -> float:
    """Return the highest resident set size of this process, MiB.

    From VmHWM where the kernel has it: getrusage's maximum survives exec, so a child would report its parent's.
    """
    if STATUS.exists():
        return _peak_mib(STATUS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


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


def _peak_mib(status: Path) -> float:
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


def peak_memory_mib() -> float:
    """Return the largest resident set so far of this process or of any child it waited for, MiB."""
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage) / (1024 if sys.platform == "linux" else 1024**2)
