"""The state of the machine while something was timed: what a reader needs to judge the noise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from optikit import host

STAT = Path("/proc/stat")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def cpu_times() -> tuple[int, int] | None:
    """Return (stolen, all) processor time since boot in clock ticks; None where the system doesn't tell."""
    if not STAT.exists():
        return None
    fields = [int(field) for field in STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
    return fields[7], sum(fields[:8])


def steal_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """Return the share of processor time that the hypervisor gave to others between two `cpu_times`.

    >>> steal_share((100, 1000), (150, 2000))
    0.05
    """
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def state() -> dict[str, Any]:
    """Return threads, load average, frequency governor: null where the system doesn't tell."""
    return {
        "threads": host.threads(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "governor": GOVERNOR.read_text(encoding="ascii").strip() if GOVERNOR.exists() else None,
    }
