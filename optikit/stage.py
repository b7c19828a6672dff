"""What a stage is: a module with the names of `Stage`. `mypy --strict` and the contract tests hold every stage to it.

A stage declares everything that others need to know of it: what it writes, what it reads, whether the target decides
its result. Planning calls `inputs`, `check`, `estimate` and `after` (pure, from facts alone, no torch); a worker calls
`run`, which gets what was declared and nothing else. Where the usual is enough, a module assigns a default of this one:

    NEEDS, WRITES, USES_TARGET, ENVIRONMENT = DENSE, "model", False, MAIN
    inputs, fits = calibrated, no_objection

The module docstring is the method card: what, Paper, Helps, Hurts, Cost, Differs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from optikit.described import Described
from optikit.errors import StageFailedError
from optikit.models.facts import ModelFacts, Trait
from optikit.problems import Problem
from optikit.targets import Target

Facts = dict[str, Any]
"""What a stage found out while it ran, as JSON: layers quantized, fallbacks taken, bits per weight."""


Writes = Literal["source", "model", "engine", "speculator", "measurement"]
"""What a step leaves: the untouched model as a directory; a changed one; a compiled one; what drafts for a model; or
figures."""
Changes = Literal["linears", "folded", "narrowed", "blocks", "all"]
"""Tensors that a stage may change: weights of the blocks' linears; what their scales are folded into, too; their widths
and biases; only which blocks there are; anything, as training does."""
MAIN: str | None = None
"""The environment that optikit itself is installed in."""
ANY: frozenset[Trait] = frozenset()
DENSE: frozenset[Trait] = frozenset({"dense"})


@dataclass(frozen=True, kw_only=True)
class Input:
    """Where planning finds something that a stage reads besides its model.

    Attributes:
        of: `calibration`: the recipe's calibration text. `prompts`: the text `spec`, or else the prompts of the speed
            test. `model`: the model `spec`. `drafter`: the EAGLE-3 drafter `spec`, which is no model. `original`: the
            recipe's model before any stage. `step`: what the newest earlier step of `made_by` left, where there is one.
            `machine`: processor and threads of this one. `plan`: whatever the plan wires to it (measurements).
        spec: What the author wrote for it; "" is nothing.
        option: The option it was written in, as messages name it.
        made_by: Verb and method.
        split: Several processes may each calibrate on a part of the text (`optikit run --ranks`).
    """

    of: Literal["calibration", "prompts", "model", "drafter", "original", "step", "machine", "plan"]
    spec: str = ""
    option: str = ""
    made_by: tuple[str, str] = ("", "")
    split: bool = False


ORIGINAL = Input(of="original")
MACHINE = Input(of="machine")
PLANNED = Input(of="plan")


def nothing(options: StageOptions) -> Mapping[str, Input]:
    """Declare no inputs besides the model: the default of `Stage.inputs`."""
    return {}


def calibrated(options: StageOptions) -> Mapping[str, Input]:
    """Declare the recipe's calibration text."""
    return {"calibration": Input(of="calibration")}


def split_calibrated(options: StageOptions) -> Mapping[str, Input]:
    """Declare the recipe's calibration text, of which several processes may each take a part."""
    return {"calibration": Input(of="calibration", split=True)}


def no_objection(options: StageOptions, facts: ModelFacts, models: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Yield nothing: the default of `Stage.fits` for stages that read no other model."""
    return iter(())


def no_row(options: StageOptions) -> str:
    """Declare that nothing of a row of architectures.toml is needed: see `Rowless`."""
    return ""


class UndeclaredInputError(LookupError):
    """A stage asked for an input that its `inputs` doesn't name: its key wouldn't change with it."""


class Inputs(Mapping[str, Path]):
    """Paths by role, as far as a stage has declared them; asking for another role is a defect, told as one."""

    def __init__(self, found: Mapping[str, Path], declared: Collection[str]) -> None:
        self._found = {role: path for role, path in found.items() if role in declared}
        self._declared = frozenset(declared)

    def _require(self, role: object) -> None:
        if role not in self._declared:
            raise UndeclaredInputError(f"input {role!r} is not declared by the stage's `inputs(options)`")

    def __getitem__(self, role: str) -> Path:
        self._require(role)
        return self._found[role]

    def __contains__(self, role: object) -> bool:
        self._require(role)
        return role in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class StageOptions(Described):
    """Options of one stage, as the author writes them: frozen, no unknown keys, every field described with its unit."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a step is expected to take.

    Attributes:
        seconds: Wall time.
        peak_bytes: Largest memory of its process.
        disk_bytes: What it leaves on disk; see `directory_bytes`.
        spare_bytes: What of the peak it does without, at the price of time, where memory is bounded.
        scratch_bytes: What it needs on disk besides, while it runs.
        streamed: What it takes block by block, as it is done where the whole model doesn't fit; None where it can't be.
    """

    seconds: float
    peak_bytes: int
    disk_bytes: int
    spare_bytes: int = 0
    scratch_bytes: int = 0
    streamed: Estimate | None = None

    def within(self, room: int) -> Estimate:
        """Return what is taken where memory is bounded: what can be spared is, and what can be streamed."""
        if self.peak_bytes <= room:
            return self
        if self.streamed is not None:
            return self.streamed.within(room)
        least = self.peak_bytes - self.spare_bytes
        return replace(self, peak_bytes=max(least, room), spare_bytes=max(0, room - least))


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


def _unheard(what: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything `run` may touch.

    Attributes:
        source: Model directory to read; never written to.
        dest: Empty directory to write the result to.
        scratch: Directory that survives a killed run of the same step: finished blocks wait here for the resume.
        inputs: What the stage declared to read, by role (`baseline`, `text`, `prompts`, …).
        calibration: Calibration text, for stages that declare it.
        seed: Seeds every random choice of the step.
        device: torch device: `cpu` or `cuda`.
        threads: CPU threads to use.
        max_memory_bytes: Bound on the step's memory, or None.
        target: Where the artifact will run, for stages that declare `USES_TARGET`.
        progress: Called with (done, total, what).
        note: Called with what a user should know, such as damage that was healed.
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
    note: Callable[[str], None] = _unheard

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
    WRITES: Writes
    """What it leaves."""
    USES_TARGET: bool
    """The target decides its result: `run` gets it, and it is part of the cache key."""
    LIBRARIES: tuple[str, ...]
    """Distributions whose versions change the result: part of the cache key."""
    ENVIRONMENT: str | None
    """Managed environment to run in; `MAIN` is optikit's own."""
    Options: type[StageOptions]

    def inputs(self, options: Any) -> Mapping[str, Input]:
        """Return what it reads besides its model, by role; all of it is part of the cache key. Pure."""
        ...

    def fits(self, options: Any, facts: ModelFacts, models: Mapping[str, ModelFacts]) -> Iterator[Problem]:
        """Yield why the models that it reads, by role, don't go with the one it gets. Pure."""
        ...

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
class Changing(Protocol):
    """A stage module that promises to leave some tensors as they are; others may change all, but lose none."""

    CHANGES: Changes


@runtime_checkable
class Rowless(Protocol):
    """A stage module that works on models without a row in architectures.toml, with some options at least."""

    def needs_row(self, options: Any) -> str:
        """Say what these options need a row for; "" where they work without."""
        ...


@runtime_checkable
class Settling(Protocol):
    """A stage module with options that depend on the model or on this machine: the plan keeps what they come to."""

    def settle(self, options: Any, facts: ModelFacts) -> Any:
        """Return the options with nothing left to be chosen."""
        ...


@runtime_checkable
class Speculating(Protocol):
    """A stage module that writes a speculator, which is measured and tuned on the compiled model."""

    def measured(self, options: Any) -> dict[str, Any]:
        """Return how `measure speculation` chooses and judges what these options ask for, as options of its own."""
        ...


@runtime_checkable
class Drafting(Protocol):
    """A stage module that brings a draft model, which has to lie beside the model where both run."""

    def drafts(self, options: Any, facts: ModelFacts, models: Mapping[str, ModelFacts]) -> ModelFacts | None:
        """Return the facts of the draft, named or to be made; None where there is none. Pure."""
        ...


@runtime_checkable
class Placing(Protocol):
    """A stage module that knows how a model lies on the target, and can say so before anything runs."""

    def placed(self, options: Any, target: Target, models: Sequence[ModelFacts], medusa_heads: int) -> list[str]:
        """Return lines for people: of the model, the first, and of the drafts that lie beside it. Pure."""
        ...


@runtime_checkable
class Emitting(Protocol):
    """A stage module whose work may be left to another machine, and finished there."""

    def absent(self, options: Any) -> str:
        """Say why what was emitted can't be finished on this machine; "" where it can."""
        ...

    def finish(self, options: Any, job: Job) -> Facts:
        """Finish the folder `job.inputs[EMITTED]` in `job.dest`, return what was found out."""
        ...


def row_problems(stage: Stage, method: str, options: Any, facts: ModelFacts) -> Iterator[Problem]:
    """Yield what follows for a stage from a model without a row: a warning, or a refusal."""
    if facts.generic is None:
        return
    needed = stage.needs_row(options) if isinstance(stage, Rowless) else "its modules' names"
    if needed:
        message = f"{method} needs a row for {facts.model_type}, which optikit doesn't have: {needed}"
        fix = "use rtn, gptq, fp8, int8 with scheme w8a16, wanda, sparsegpt or magnitude, which walk any model"
        yield Problem(code="needs-row", message=message, fix=fix)
        return
    message = f"no row for {facts.model_type}: generic walk, over the linear layers that its headers show"
    yield Problem(code="no-row", message=message, level="warning")


EMITTED = "emitted"
"""Fact of a stage that left its work to another machine, and the input that holds its folder when it is finished."""
RETURNED = "returned"
"""Input that holds the result.json which came back from the machine that finished an emitted folder."""
VERIFIED = "verified"
"""Fact of a step that was finished on another machine: its name, its accelerators, and what they decoded."""
SERVERS_PEAK = "servers_peak_memory_mib"
"""Fact of a stage that started servers: the memory of all of them, which the kernel doesn't count as its children's."""
