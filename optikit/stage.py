"""What a stage is: a module with these names. `mypy --strict` and the contract tests hold every stage to it.

Planning calls `check`, `estimate` and `after` (pure, from facts alone, no torch); a worker calls `run`.
The module docstring is the method card: what, Paper, Helps, Hurts, Cost, Differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from optikit.errors import StageFailedError
from optikit.models.facts import ModelFacts, Trait
from optikit.problems import Problem
from optikit.targets import Target

Facts = dict[str, Any]
"""What a stage found out while it ran, as JSON: layers quantized, fallbacks taken, bits per weight."""


class StageOptions(BaseModel):
    """Options of one stage, as the author writes them: frozen, no unknown keys, every field described with its unit."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a step is expected to take.

    Attributes:
        seconds: Wall time.
        peak_bytes: Largest memory of its process.
        disk_bytes: What it leaves on disk; see `directory_bytes`.
        spare_bytes: What of the peak it does without, at the price of time, where memory is bounded.
        scratch_bytes: What it needs on disk besides, while it runs.
    """

    seconds: float
    peak_bytes: int
    disk_bytes: int
    spare_bytes: int = 0
    scratch_bytes: int = 0


def directory_bytes(weight_bytes: int, vocab: int) -> int:
    """Return the size of a model directory: its weights, and a tokenizer.json of about 72 bytes per token."""
    return weight_bytes + 72 * vocab


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text whose activations guide a stage: `samples` windows of `length` tokens drawn from a file.

    Attributes:
        text: UTF-8 file, already fetched and cut to the part that the recipe names.
        samples: Number of windows.
        length: Tokens per window.
    """

    text: Path
    samples: int
    length: int


def _silent(done: int, total: int, what: str) -> None:
    """Report no progress: the default of a job that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything `run` may touch.

    Attributes:
        source: Model directory to read; never written to.
        dest: Empty directory to write the result to.
        scratch: Directory that survives a killed run of the same step: finished blocks wait here for the resume.
        inputs: Other artifacts that the step reads, by role (`baseline`, `text`, `prompts`, …).
        calibration: Calibration text, for stages that ask for it.
        seed: Seeds every random choice of the step.
        device: torch device: `cpu` or `cuda`.
        threads: CPU threads to use.
        max_memory_bytes: Bound on the step's memory, or None.
        target: Where the artifact will run, for stages that write for it (`TARGETED = True`).
        progress: Called with (done, total, what).
    """

    source: Path
    dest: Path
    scratch: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    calibration: Calibration | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    max_memory_bytes: int | None = None
    target: Target | None = None
    progress: Callable[[int, int, str], None] = _silent

    def calibrated(self) -> Calibration:
        """Return the calibration text of a stage that can't do without.

        Raises:
            StageFailedError: There is none.
        """
        if self.calibration is None:
            message, fix = "this method needs calibration text", "add `calibration: {text: …}` to the recipe"
            raise StageFailedError(message, fix=fix)
        return self.calibration


class Stage(Protocol):
    """A stage module."""

    SUMMARY: str
    """One line for `optikit stages`."""
    NEEDS: frozenset[Trait]
    """Traits that the source must have."""
    CALIBRATED: bool
    """Reads the recipe's calibration text."""
    LIBRARIES: tuple[str, ...]
    """Distributions whose versions change the result: part of the cache key."""
    ENVIRONMENT: str | None
    """Managed environment to run in; None is the main one."""
    Options: type[StageOptions]

    def check(self, options: Any, facts: ModelFacts, target: Target) -> Iterator[Problem]:
        """Yield what these options can't do to this model on this target. Pure; `loc` is relative to the options."""
        ...

    def estimate(self, options: Any, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
        """Estimate time on two CPU cores, memory and disk. Pure."""
        ...

    def after(self, options: Any, facts: ModelFacts) -> ModelFacts:
        """Return the facts of the model that `run` will write. Pure."""
        ...

    def run(self, options: Any, job: Job) -> Facts:
        """Read `job.source`, write `job.dest`, return what was found out."""
        ...


@runtime_checkable
class Emitting(Protocol):
    """A stage module whose work may be left to another machine, and finished there."""

    def absent(self, options: Any) -> str:
        """Say why what was emitted can't be finished on this machine; "" where it can."""
        ...

    def finish(self, options: Any, job: Job) -> Facts:
        """Finish the folder `job.inputs["emitted"]` in `job.dest`, return what was found out."""
        ...


SERVERS_PEAK = "servers_peak_memory_mib"
"""Fact of a stage that started servers: the memory of all of them, which the kernel doesn't count as its children's."""
