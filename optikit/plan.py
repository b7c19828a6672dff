"""Recipe → plan: resolved, checked, estimated, frozen. Nothing here imports torch or reads a weight.

A `Step` names its inputs by cache key, so the whole chain of keys is known before anything runs: a plan can say what
is cached, and two recipes that share a prefix share its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.recipe.schema import Recipe
from optikit.stages.protocol import Estimate, StageOptions
from optikit.store.sources import ModelSource, TextSource
from optikit.targets import Target


@dataclass(frozen=True, kw_only=True)
class Step:
    """One unit of work with one sealed result.

    Attributes:
        name: Short and unique in the plan: `1-quantize-gptq`, `measure-quality-result`.
        verb, method: Which stage module does it.
        options: Its validated options.
        key: sha256 hex of everything that decides the result; the name of the result in the store.
        source: Key of the artifact it reads as its model, or "" for the original model directory.
        inputs: Other artifacts by role → key; roles that are plain files are in `files`.
        files: Plain input files by role → absolute path.
        environment: Managed environment, or None.
        estimate: Expected time, memory, disk.
        before, after: Facts of the model that is read and of the one that will be written.
    """

    name: str
    verb: str
    method: str
    backend: str
    options: StageOptions
    key: str
    source: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    environment: str | None = None
    estimate: Estimate
    before: ModelFacts
    after: ModelFacts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe, resolved: what will happen, in order, and what it is expected to take."""

    recipe: Recipe
    target: Target
    model: ModelSource
    texts: Mapping[str, TextSource]
    steps: tuple[Step, ...]
    measures: tuple[Step, ...]
    warnings: tuple[Problem, ...]
