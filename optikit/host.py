"""What machine this is: cores, memory, instruction sets, load. Recorded with every measurement, part of some keys."""

from __future__ import annotations

import functools
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any


def threads() -> int:
    """Return the CPU threads that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def cpu_model() -> str:
    """Return the processor's name, or its architecture where the system doesn't tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def isa() -> tuple[str, ...]:
    """Return the instruction sets that decide which kernels run, of those this processor has."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    deciding = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
    return tuple(flag for flag in deciding if flag in flags)


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
    """Return the memory that this process may use: the machine's, or its control group's limit where lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.exists() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
            total = min(total, int(text))
    return total


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
