"""What every part of planning reads: the recipe with its sources resolved; and how a step is put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from optikit import environments, host, stages
from optikit.environments import cuda
from optikit.host import versions
from optikit.models.facts import ModelFacts
from optikit.plan.model import Step
from optikit.recipe.schema import Recipe, StageEntry, Text
from optikit.stage import Input, Stage, StageOptions, UndeclaredInputError
from optikit.store.code_digest import source_digest
from optikit.store.sources import ModelSource, TextSource, resolve_model, resolve_text
from optikit.store.store import cache_key
from optikit.targets import Target

if TYPE_CHECKING:
    from pathlib import Path

    from optikit.store.store import Store

KEY_SCHEMA = 2
"""Raised when the meaning of a cache key changes."""
UNREAD = "unread"
"""In the place of a model's digest where a plan didn't read its weights: no artifact has a key made with it."""
BYTES_PER_TOKEN = 4
"""Of prose, by tokenizers of 32,000 to 150,000 words."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the plan found for one input of a stage: an artifact of the store, or files with their digest.

    Attributes:
        key: Key of the artifact; "" where it is none, or the original model as it lies there.
        digest: Of the files; for an artifact its key says it all.
        path: Of the files; "" for an artifact.
    """

    key: str = ""
    digest: str = ""
    path: str = ""


def given(source: TextSource | ModelSource) -> Found:
    """Return a resolved source as an input."""
    return Found(digest=source.digest or UNREAD, path=str(source.path))


@dataclass(frozen=True, kw_only=True)
class Context:
    """A recipe with its sources resolved.

    Attributes:
        device: torch device that stages will compute on.
        facts: Facts of the untouched model.
        texts: Resolved texts by role: `calibration`, `perplexity`, `prompts`, `serving`, `tasks.NAME`,
            `stages[0].prompts`.
        models: Resolved models that stages name besides the recipe's, by role: `stages[0].draft`.
    """

    recipe: Recipe
    device: str
    target: Target
    model: ModelSource
    facts: ModelFacts
    texts: Mapping[str, TextSource]
    models: Mapping[str, ModelSource] = field(default_factory=dict)

    def step(
        self,
        name: str,
        what: tuple[str, str],
        options: StageOptions,
        *,
        on: tuple[str, ModelFacts],
        found: Mapping[str, Found] | None = None,
        backend: str = stages.OURS,
        subject: str = "",
        tokens: int = 0,
    ) -> Step:
        """Return a step with its key: everything that decides its result, and nothing else.

        Never part of it: paths, times, user names, the number of threads of what isn't timed.

        Args:
            name: Its name in the plan.
            what: Verb and method.
            options: The stage's options.
            on: The model that it reads: key, "" for the original one, and facts.
            found: What was found for its inputs, by role.
            backend: Who does the work.
            subject: Name of the step that it measures.
            tokens: Of the texts that it reads.

        Raises:
            UndeclaredInputError: A role in `found` isn't one of the stage's inputs.
        """
        (verb, method), (source, facts) = what, on
        stage = stages.load(verb, method, backend)
        declared = stage.inputs(options)
        inputs = dict(found or {})
        if not inputs.keys() <= declared.keys():
            message = f"{verb} {method} gets {sorted(inputs.keys() - declared.keys())}, which it doesn't declare"
            raise UndeclaredInputError(message)
        return Step(
            name=name,
            verb=verb,
            method=method,
            backend=backend,
            writes=stage.WRITES,
            subject=subject,
            options=options,
            key=self._key(what, backend, options, source, inputs),
            source=source,
            inputs={role: one.key for role, one in inputs.items() if not one.path},
            files={role: one.path for role, one in inputs.items() if one.path and declared[role].of != "calibration"},
            calibration=self.calibration if "calibration" in inputs else None,
            split=any(one.split for one in declared.values()),
            environment=self.environment(stage)[0],
            estimate=stage.estimate(options, facts, self.target, tokens),
            before=facts,
            after=stage.after(options, facts),
        )

    def _key(
        self, what: tuple[str, str], backend: str, options: StageOptions, source: str, inputs: Mapping[str, Found]
    ) -> str:
        """Return the cache key of a step."""
        stage = stages.load(*what, backend)
        return cache_key(
            schema=KEY_SCHEMA,
            verb=what[0],
            method=what[1],
            backend=backend,
            code=source_digest(stages.module(*what, backend)),
            options=options.model_dump(mode="json"),
            seed=self.recipe.seed,
            device=self.device_of(stage),
            parent=source or self._original,
            inputs={role: one.key or one.digest or self._original for role, one in inputs.items()},
            **_installed(stage, self.environment(stage)[0]),
            **self._surroundings(stage, stage.inputs(options)),
        )

    @property
    def _original(self) -> str:
        return self.model.digest or UNREAD

    def environment(self, stage: Stage) -> tuple[str | None, str]:
        """Return the environment that a stage runs in on this device, and why it is none for the GPU."""
        if stage.ENVIRONMENT is None:
            return None, ""
        return cuda.choose(stage.ENVIRONMENT, self.device)

    def device_of(self, stage: Stage) -> str:
        """Return where a stage computes: on the CPU where its environment can't do otherwise."""
        name, _ = self.environment(stage)
        return self.device if name is None else environments.find(name).device

    def _surroundings(self, stage: Stage, declared: Mapping[str, Input]) -> dict[str, Any]:
        """Return what else decides a result: the target, this machine, the instructions that its arithmetic has."""
        unpriced = replace(self.target, usd_per_hour=None, price_source="")
        found: dict[str, Any] = {"target": asdict(unpriced)} if stage.USES_TARGET else {}
        kinds = {one.of for one in declared.values()}
        if "machine" in kinds:
            found["machine"] = {"cpu": host.cpu_model(), "threads": host.threads()}
        if kinds & {"calibration", "prompts"}:  # it runs the model, in bf16 where the processor can
            found["isa"] = host.isa()
        return found

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The calibration text as a worker is told of it; None where the recipe has none."""
        wanted = self.recipe.calibration
        if wanted is None:
            return None
        return {"text": str(self.texts["calibration"].path), "samples": wanted.samples, "length": wanted.length}

    def stage_text(self, index: int, role: str) -> TextSource | None:
        """Return the prompts of a stage: its own, or else those of the speed test."""
        return self.texts.get(at(index, role)) or self.texts.get("prompts")


def at(index: int, role: str) -> str:
    """Return the role of an input of the stage at `index` among all texts and models of a recipe."""
    return f"stages[{index}].{role}"


def _installed(stage: Stage, environment: str | None) -> dict[str, Any]:
    """Return what decides which libraries do the work: their versions here, or the environment's lock."""
    if environment is None:
        return {"versions": versions(stage.LIBRARIES)}
    return {"environment": environments.find(environment).digest}


def stage_inputs(recipe: Recipe) -> Iterator[tuple[int, StageEntry, str, Input]]:
    """Yield every input that a recipe's stages declare, with the stage's index and entry, and the input's role."""
    for index, entry in enumerate(recipe.stages):
        for role, wanted in entry.stage.inputs(entry.options).items():
            yield index, entry, role, wanted


def named_texts(recipe: Recipe) -> dict[str, Text]:
    """Return the texts that a recipe names, by what they are for."""
    named: dict[str, Text | None] = {"calibration": recipe.calibration, "perplexity": recipe.evaluate.perplexity}
    speed = recipe.evaluate.speed
    if speed is not None and speed.prompts:
        named["prompts"] = Text(text=speed.prompts)
    serving = recipe.evaluate.serving
    if serving is not None and serving.prompts:
        named["serving"] = Text(text=serving.prompts)
    named |= {f"tasks.{task.name}": task for task in recipe.evaluate.tasks}
    for index, _, role, wanted in stage_inputs(recipe):
        if wanted.of == "prompts" and wanted.spec:
            named[at(index, role)] = Text(text=wanted.spec)
    return {role: text for role, text in named.items() if text is not None}


def resolve_texts(
    recipe: Recipe, store: Store, *, base: Path, offline: bool, note: Callable[[str], None]
) -> dict[str, TextSource]:
    """Fetch every text that a recipe names; return them by role."""
    return {
        role: resolve_text(text, store, base=base, offline=offline, note=note)
        for role, text in named_texts(recipe).items()
    }


def resolve_models(
    recipe: Recipe, store: Store, *, base: Path, offline: bool, note: Callable[[str], None], **how: bool
) -> dict[str, ModelSource]:
    """Fetch every model that a recipe's stages name besides its own; return them by role."""
    return {
        at(index, role): resolve_model(wanted.spec, store, base=base, offline=offline, note=note, **how)
        for index, _, role, wanted in stage_inputs(recipe)
        if wanted.of in ("model", "drafter") and wanted.spec
    }


def tokens_of(texts: Iterable[TextSource]) -> int:
    """Return about how many tokens texts have, by their size: nobody has read them yet."""
    return sum(text.path.stat().st_size for text in texts) // BYTES_PER_TOKEN
