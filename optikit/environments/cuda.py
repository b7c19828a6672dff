"""Which environment a step on a GPU runs in: by the driver's CUDA version, this machine and its interpreters.

A row of cuda.toml is offered where every package of its lock has a wheel, on the kinds of machine and for the
interpreters that cuda_rows.toml lists; why it isn't elsewhere stands there, too.
"""

from __future__ import annotations

import functools
import platform
import shutil
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optikit.environments.definition import CUDA_ROWS, ROOT, cuda_rows
from optikit.process import program
from optikit.targets import nvidia

SECONDS = 30.0
"""How long `nvidia-smi` may take: it loads the driver where nothing else has."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A row of cuda.toml on this machine.

    Attributes:
        name: Of the environment.
        instead: Of the one for CPUs.
        cuda: Major version.
        python: Interpreter that it gets; "" where it isn't offered.
        why: Why it isn't; "" where it is.
    """

    name: str
    instead: str
    cuda: int
    python: str = ""
    why: str = ""


@functools.cache
def driver() -> nvidia.Driver | None:
    """Return this machine's NVIDIA driver, None where there is none that answers."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    try:
        done = program.run([smi], seconds=SECONDS)
    except (OSError, TimeoutError):
        return None
    return nvidia.driver(done.output) if done.code == 0 else None


def offers(here: nvidia.Driver | None, machine: str = "", own: str = "") -> tuple[Offer, ...]:
    """Return every row with what it is on a machine, the latest CUDA version first.

    Args:
        here: Its driver.
        machine: Its kind, `x86_64` or `aarch64`; "" is this one's.
        own: Version of the interpreter that optikit runs in, which is preferred; "" is this one's.
    """
    machine = machine or platform.machine()
    own = own or f"{sys.version_info.major}.{sys.version_info.minor}"
    wheels = tomllib.loads((ROOT / CUDA_ROWS).read_text(encoding="utf-8"))
    rows = sorted(cuda_rows(ROOT).items(), key=lambda row: (-row[1]["cuda"], row[0]))
    return tuple(_offer(name, row, wheels[name], here, machine, own) for name, row in rows)


def _offer(
    name: str, row: Mapping[str, Any], wheels: Mapping[str, Any], here: nvidia.Driver | None, machine: str, own: str
) -> Offer:
    offer = Offer(name=name, instead=row["instead"], cuda=row["cuda"])
    pythons = wheels.get(machine, [])
    if not pythons:
        why = wheels["absent"].get(machine, f"no lock for {machine}")
        return Offer(**{**vars(offer), "why": why})
    if here is None:
        return Offer(**{**vars(offer), "why": "there is no NVIDIA driver here"})
    if here.cuda[0] < row["cuda"]:
        why = f"driver {here.version} runs CUDA {here.cuda[0]}.{here.cuda[1]}, and it needs {row['cuda']}"
        return Offer(**{**vars(offer), "why": why})
    return Offer(**{**vars(offer), "python": own if own in pythons else pythons[-1]})


def choose(name: str, device: str) -> tuple[str, str]:
    """Return the environment that a step runs in which asks for `name`, and why it is none for the GPU.

    Args:
        name: Environment that the stage names.
        device: torch device of the run.

    Returns:
        The name, and "" where it computes on the device that is asked for.
    """
    if not device.startswith("cuda"):
        return name, ""
    found = [offer for offer in offers(driver()) if offer.instead == name]
    for offer in found:
        if offer.python:
            return offer.name, ""
    return name, "; ".join(f"{offer.name}: {offer.why}" for offer in found) or f"{name} has no environment for CUDA"
