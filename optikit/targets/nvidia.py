"""What `nvidia-smi` says: the driver, the CUDA version that it can run, and each GPU. Pure: text in, rows out."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass

QUERY = ("name", "compute_cap", "memory.total", "mig.mode.current")
"""Fields for `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`, in the order that `gpus` reads."""
_CUDA = re.compile(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)")
_DRIVER = re.compile(r"(?:Driver Version|DRIVER version)\s*:\s*([0-9.]+)")
_MIG = re.compile(r"^\s+MIG (?P<profile>\S+)\s+Device\s+(?P<number>\d+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        name: Such as `NVIDIA H200`.
        capability: Compute capability, (9, 0); (0, 0) where the driver doesn't tell.
        memory_mib: All of it.
        mig: Whether it is cut into instances; a process then gets one of those, not all the memory.
    """

    name: str
    capability: tuple[int, int]
    memory_mib: int
    mig: bool = False


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A driver: its version, and the highest CUDA version that it runs, (13, 0)."""

    version: str
    cuda: tuple[int, int]


def driver(page: str) -> Driver | None:
    """Return the driver that the page of `nvidia-smi` (or of `nvidia-smi --version`) tells of, None if none.

    >>> driver("| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06    CUDA Version: 13.0     |")
    Driver(version='580.65.06', cuda=(13, 0))
    """
    version, cuda = _DRIVER.search(page), _CUDA.search(page)
    if version is None or cuda is None:
        return None
    return Driver(version=version[1], cuda=(int(cuda[1]), int(cuda[2])))


def gpus(rows: str) -> tuple[Gpu, ...]:
    """Return the GPUs of a query for `QUERY`; what a driver doesn't know it writes as [N/A] or [Not Supported].

    >>> gpus("NVIDIA H200, 9.0, 143771, Disabled")
    (Gpu(name='NVIDIA H200', capability=(9, 0), memory_mib=143771, mig=False),)
    """
    found = []
    for row in csv.reader(rows.replace("\r", "\n").splitlines(), skipinitialspace=True):
        if len(row) != len(QUERY):
            continue
        name, capability, memory, mig = (each.strip() for each in row)
        numbers = re.fullmatch(r"(\d+)\.(\d+)", capability)
        found.append(
            Gpu(
                name=name,
                capability=(int(numbers[1]), int(numbers[2])) if numbers else (0, 0),
                memory_mib=int(memory) if memory.isdigit() else 0,
                mig=mig == "Enabled",
            )
        )
    return tuple(found)


def mig_profiles(listing: str) -> tuple[str, ...]:
    r"""Return the profiles of the instances that `nvidia-smi -L` lists.

    >>> mig_profiles("GPU 0: NVIDIA A100 (UUID: GPU-1)\n  MIG 3g.20gb     Device  0: (UUID: MIG-2)")
    ('3g.20gb',)
    """
    return tuple(found["profile"] for found in _MIG.finditer(listing))
