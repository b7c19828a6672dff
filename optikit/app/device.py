"""Which torch device a command computes on: the one that is asked for, or what is there."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path

from optikit import host
from optikit.errors import UnavailableError

CPU_BUILD = "+cpu"
"""How the version of a torch ends that was built without CUDA."""


class DeviceChoice(StrEnum):
    """Where a command computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def choose(wanted: str) -> str:
    """Return the torch device: `auto` is a GPU where its driver is, and a torch that can use it.

    Raises:
        UnavailableError: A GPU is asked for, and one of the two isn't here.
    """
    if wanted not in (DeviceChoice.AUTO, DeviceChoice.CUDA):
        return wanted
    missing = _missing()
    if not missing:
        return "cuda"
    if wanted == DeviceChoice.AUTO:
        return "cpu"
    raise UnavailableError(f"--device cuda: {missing}", fix="use --device cpu; `optikit doctor` says what is here")


def _missing() -> str:
    """Say what a GPU lacks here, by looking at files only; "" where nothing does."""
    if not Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi") is None:
        return "there is no NVIDIA driver here"
    version = host.versions(("torch",)).get("torch", "")
    return f"torch {version} was built without CUDA" if version.endswith(CPU_BUILD) else ""
