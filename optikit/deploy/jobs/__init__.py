"""The contract of `deploy/jobs`: a recipe on a scheduler. A module here turns a `Job` into the files of a folder.

Whatever the scheduler, the job runs `optikit run` on the recipe beside it, with its store on a volume that outlives it:
when it is preempted or its node is lost, the next attempt goes on after the last finished block.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from optikit.targets import Target

SCHEDULERS = ("k8s", "slurm", "sagemaker", "skypilot")
"""Each is the module of its name."""
FINAL = (2, 10, 11, 65, 66, 73, 76, 77)
"""Exit codes that another attempt ends with, too: a job isn't restarted after them."""
RECIPE = "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe to run elsewhere.

    Attributes:
        name: Lower-case letters, digits and dashes, a letter first, 40 at most.
        files: The recipe, named `RECIPE`, and texts that it names: path in the folder → content.
        target: Where the result will run: the job needs its accelerators.
        cpus: Processors.
        memory_bytes, disk_bytes: What the largest step, and all steps together, are expected to take, with room.
        seconds: Longest time of an attempt.
        install: What `pip install` is told.
        image: Container image with Python; "" where the scheduler has a usual one.
        environment: Variables of the run.
    """

    name: str
    files: Mapping[str, bytes]
    target: Target
    cpus: int
    memory_bytes: int
    disk_bytes: int
    seconds: int
    install: str
    image: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        """Number of GPUs of the target."""
        return self.target.count if self.target.device == "cuda" else 0

    @property
    def memory_mib(self) -> int:
        """Memory in whole 2²⁰ bytes."""
        return -(-self.memory_bytes // 2**20)

    @property
    def disk_gib(self) -> int:
        """Disk in whole 2³⁰ bytes."""
        return -(-self.disk_bytes // 2**30)

    @property
    def python_image(self) -> str:
        """Image that has Python and pip."""
        return self.image or "python:3.12-slim"

    def run(self, folder: str, volume: str) -> str:
        """Return the command line, where the folder and the volume are seen at these places."""
        words = ["optikit", "run", f"{folder}/{RECIPE}", "--out", f"{volume}/{self.name}/out", "--progress", "plain"]
        return " ".join([f'"{word}"' if "$" in word else shlex.quote(word) for word in words])

    def installed(self, volume: str) -> str:
        """Return the shell line that installs optikit, once per volume."""
        venv = f'"{volume}/venv"' if "$" in volume else f"{volume}/venv"
        made = f"python3 -m venv {venv} && {venv}/bin/pip install --quiet {shlex.quote(self.install)}"
        return f"[ -x {venv}/bin/optikit ] || {{ {made}; }}"


class Scheduler(Protocol):
    """What a module of `deploy/jobs` has."""

    SUMMARY: str
    """One line."""
    CHECKED: str
    """How its files were checked, and by what."""

    def refusal(self, job: Job) -> tuple[str, str]:
        """Return why a job can't go there, and one fix; empty texts where it can."""
        ...

    def files(self, job: Job) -> dict[str, str]:
        """Return the files of the folder besides the recipe's own."""
        ...

    def command(self, job: Job) -> str:
        """Return the one command that submits it, typed in the folder."""
        ...

    def again(self, job: Job) -> str:
        """Say, in a sentence, what restarts it and where it goes on."""
        ...


def load(name: str) -> Scheduler:
    """Return the module of a scheduler."""
    module: Any = import_module(f"{__name__}.{name}")
    return module  # type: ignore[no-any-return]
