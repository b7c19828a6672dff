"""What machine this is: cores, memory, instruction sets, load. Recorded with every measurement, part of some keys."""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
KEPT_BYTES = 256 * 2**20
"""Memory that no step is planned into: the system has it, and optikit itself beside the step's process."""


def threads() -> int:
    """Return the CPU threads that this process may use: its processors, or its control group's share where smaller."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, _cpu_shares())]))


def group_files(controller: str, name: str) -> Iterator[Path]:
    """Yield the files of a name that this process's control groups have, from its own group up to the root.

    Args:
        controller: Such as `memory`; version 1 has a hierarchy for each, version 2 one for all.
        name: Of the file in either version, such as `memory.max`.
    """
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, group = GROUPS / controller if controllers else GROUPS, PurePosixPath(own)
        for each in (group, *group.parents):
            path = root / str(each).lstrip("/") / name
            if path.is_file():
                yield path


def _figures(path: Path) -> list[float]:
    """Return the numbers in a control group's file; "max" is infinity."""
    try:
        words = path.read_text(encoding="utf-8").split()
        return [math.inf if word == "max" else float(word) for word in words]
    except (OSError, ValueError):
        return []


def _cpu_shares() -> Iterator[float]:
    """Yield how many processors' time each control group of this process may use."""
    for path in group_files("cpu", "cpu.max"):
        match _figures(path):
            case [quota, period] if period > 0 and quota < math.inf:
                yield quota / period
    for path in group_files("cpu", "cpu.cfs_quota_us"):
        match [*_figures(path), *_figures(path.with_name("cpu.cfs_period_us"))]:
            case [quota, period] if period > 0 and quota > 0:
                yield quota / period


@cache
def cpu_model() -> str:
    """Return the processor's name, or its architecture where the system doesn't tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def isa() -> tuple[str, ...]:
    """Return the instruction sets that decide which kernels run, of those this processor has."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    deciding = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return tuple(flag for flag in (*deciding, "asimd", "bf16", "i8mm") if flag in flags)


def multiplies_int8() -> bool:
    """Return whether products of 8-bit integers are summed in 32 bits: AVX2's own instruction sums them in 16."""
    return bool({"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimd"} & set(isa()))


def _cpuinfo(field: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return None


def memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or its control groups' limit where lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files = (path for name in ("memory.max", "memory.limit_in_bytes") for path in group_files("memory", name))
    limits = (limit for path in files for limit in _figures(path) if 0 < limit < total)
    return int(min(limits, default=total))


def room_bytes(bound: int | None = None) -> int:
    """Return the memory that one step may take: what this machine has for it, or a bound where that is lower."""
    here = max(0, memory_bytes() - KEPT_BYTES)
    return here if bound is None else min(here, bound)


def describe() -> dict[str, Any]:
    """Return this machine as the report shows it."""
    return {
        "cpu": cpu_model(),
        "isa": list(isa()),
        "threads": threads(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions(libraries: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions of distributions; those that aren't installed are left out."""
    return {name: found for name in libraries if (found := _version(name))}


@functools.cache
def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
