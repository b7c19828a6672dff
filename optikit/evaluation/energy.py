"""Energy that a machine counts itself: RAPL of processors and memory, NVML of NVIDIA GPUs.

RAPL counts microjoules in files that start again from zero at a range of their own; NVML counts millijoules since the
driver was loaded. What is counted is the machine, not a process: anything else that runs meanwhile is part of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
COUNTED = ("package", "dram")
"""Zones that add up to a machine's processors and memory: cores and uncore are parts of a package, psys is of all."""
MICRO = 1_000_000
NO_COUNTERS = "this machine tells no energy: it has neither RAPL counters nor NVIDIA GPUs that NVML can read"


@dataclass(frozen=True)
class Counter:
    """A counter of microjoules; `wraps_at` is where it starts again from zero, or None."""

    name: str
    read: Callable[[], int]
    wraps_at: int | None = None


@dataclass(frozen=True)
class Meter:
    """All counters of a machine; `reason` says why there are none."""

    counters: tuple[Counter, ...]
    reason: str = ""

    def read(self) -> tuple[int, ...]:
        """Return every counter, microjoules."""
        return tuple(counter.read() for counter in self.counters)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float | None:
        """Return the energy between two readings; None without counters. A counter may have wrapped once."""
        if not self.counters:
            return None
        pairs = zip(self.counters, before, after, strict=True)
        return sum(spent(start, end, counter.wraps_at) for counter, start, end in pairs) / MICRO


def spent(before: int, after: int, wraps_at: int | None) -> int:
    """Return by how much a counter grew.

    >>> spent(10, 25, 100), spent(90, 5, 100)
    (15, 15)
    """
    if after < before and wraps_at is not None:
        return after - before + wraps_at
    return max(0, after - before)


def find(powercap: Path = POWERCAP) -> Meter:
    """Find the counters of this machine."""
    try:
        counters = (*_rapl(powercap), *_nvml())
        Meter(counters).read()
    except PermissionError as error:
        return Meter((), f"the energy counter {error.filename} is readable by root only")
    except (OSError, ValueError) as error:
        return Meter((), f"the energy counters can't be read: {error}")
    return Meter(counters, "" if counters else NO_COUNTERS)


def _rapl(powercap: Path) -> Iterator[Counter]:
    """Yield counters of zones such as intel-rapl:0 (package-0) and intel-rapl:0:1 (dram); AMD's are called so, too."""
    for zone in sorted(powercap.glob("intel-rapl:*")):
        name = (zone / "name").read_text(encoding="ascii").strip()
        if name.startswith(COUNTED):
            wraps_at = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
            socket = zone.name.split(":")[1]
            yield Counter(name if name != "dram" else f"dram-{socket}", _reader(zone / "energy_uj"), wraps_at)


def _reader(path: Path) -> Callable[[], int]:
    return lambda: int(path.read_text(encoding="ascii"))


def _nvml() -> Iterator[Counter]:
    """Yield counters of GPUs; none without nvidia-ml-py, a driver, or on boards that don't count."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return
    try:
        nvml.nvmlInit()
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            yield Counter(f"{nvml.nvmlDeviceGetName(handle)} {index}", _gpu(nvml, handle))
    except nvml.NVMLError:
        return


def _gpu(nvml: Any, handle: Any) -> Callable[[], int]:
    return lambda: 1000 * int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
