"""`Step` and `Plan`: frozen, printable, complete. Nothing here imports torch or reads a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.recipe import limits
from optikit.recipe.schema import Recipe
from optikit.stage import Estimate, StageOptions, Writes
from optikit.store.sources import ModelSource, TextSource
from optikit.targets import Target

SERVING = "measure-serving"
"""Name of the step that loads the result behind a server."""
BASELINE = "baseline"
"""Subject of a step that measures the untouched model."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One unit of work with one sealed result.

    Attributes:
        name: Short and unique in the plan: `1-quantize-gptq`, `measure-speed`.
        verb, method: Which stage module does it.
        backend: Who does the work.
        writes: What it leaves.
        subject: Name of the step that it measures, `baseline` for the untouched model; "" where it measures none alone.
        options: The stage's validated options.
        key: sha256 hex of everything that decides the result; its name in the store.
        source: Key of the artifact it reads as its model, or "" for the original model.
        inputs: Other artifacts by role → key ("" for the original model).
        files: Plain input files by role → absolute path.
        calibration: Request of calibration text: {text, samples, length}, or None.
        split: Several processes may each calibrate on a part of the text.
        environment: Managed environment, or None.
        estimate: Expected time, memory, disk.
        before: Facts of the model that it reads.
        after: Facts of the model that it will write.
    """

    name: str
    verb: str
    method: str
    backend: str = "optikit"
    writes: Writes
    subject: str = ""
    options: StageOptions
    key: str
    source: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    split: bool = False
    environment: str | None = None
    estimate: Estimate
    before: ModelFacts
    after: ModelFacts


def original_key(steps: Iterable[Step]) -> str:
    """Return the key of the untouched model's directory, "" where the source is that directory."""
    return next((step.key for step in steps if step.writes == "source"), "")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe, resolved: what will happen, in order, and what it is expected to take.

    Attributes:
        steps: What makes the artifact, in order; the first may be the conversion of the source.
        measures: What measures it, afterwards.
        warnings: Problems that don't refuse the recipe.
    """

    recipe: Recipe
    target: Target
    model: ModelSource
    facts: ModelFacts
    texts: Mapping[str, TextSource]
    models: Mapping[str, ModelSource] = field(default_factory=dict)
    steps: tuple[Step, ...]
    measures: tuple[Step, ...]
    max_memory_bytes: int | None
    device: str
    warnings: tuple[Problem, ...]

    @property
    def order(self) -> tuple[Step, ...]:
        """Steps as they are executed: measured in the end, or as soon as possible where a gate may stop the run."""
        if not any(each.limit.on_fail == "stop" for each in limits.asked(self.recipe.gates)):
            return (*self.steps, *self.measures)
        ordered: list[Step] = []
        waiting, made = list(self.measures), {""}
        for step in (None, *self.steps):
            ordered += [step] if step else []
            made |= {step.key} if step else set()
            for measure in list(waiting):
                if {measure.source, *measure.inputs.values()} <= made:
                    waiting.remove(measure)
                    ordered.append(measure)
                    made.add(measure.key)
        return (*ordered, *waiting)

    def until(self, name: str) -> Plan:
        """Return the plan that ends with a step: what is made and measured after it is left out."""
        steps = self.steps[: [step.name for step in self.steps].index(name) + 1]
        made = {"", *(step.key for step in steps)}
        kept: list[Step] = []
        for measure in self.measures:
            if {measure.source, *measure.inputs.values()} <= made:
                kept.append(measure)
                made.add(measure.key)
        return replace(self, steps=steps, measures=tuple(kept))

    @property
    def sources(self) -> tuple[ModelSource | TextSource, ...]:
        """Everything that the recipe names and a lock pins: the model, texts, drafts."""
        return (self.model, *self.texts.values(), *self.models.values())

    @property
    def unread(self) -> tuple[ModelSource, ...]:
        """Models whose weights were not read: nobody knows yet which keys their steps have."""
        return tuple(model for model in (self.model, *self.models.values()) if not model.digest)

    @property
    def keyless(self) -> frozenset[str]:
        """Keys that are none: of the steps that read a model which wasn't read, and of what is made of theirs."""
        paths, found = {str(model.path) for model in self.unread}, set[str]()
        for step in (*self.steps, *self.measures):
            keys = {step.source, *step.inputs.values()}
            original = not self.model.digest and "" in keys
            if original or keys & found or paths & set(step.files.values()):
                found.add(step.key)
        return frozenset(found)

    @property
    def baseline_key(self) -> str:
        """Key of the untouched model's directory, "" where the source is that directory."""
        return original_key(self.steps)
