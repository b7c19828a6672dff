"""One measuring step each: what it asks of its stage, which inputs it gets. Who measures what is decided elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optikit import stages
from optikit.errors import InputMissingError
from optikit.evaluation import task_items
from optikit.models.facts import ModelFacts
from optikit.plan.context import Context, Found, given, tokens_of
from optikit.plan.model import Step
from optikit.recipe.schema import PerplexityOptions, TaskOptions
from optikit.stage import StageOptions
from optikit.store.sources import TextSource

SPEED = "measure-speed"
"""Name of the step that times."""
SCORING = ("quality", "served")
"""Methods of `measure` that score text."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure: which step made it, where it lies, what loads it, what is known of it.

    Attributes:
        name: Of the step; `baseline` is the untouched model.
        key: Of the artifact; "" is the original model.
    """

    name: str
    key: str
    runtime: str
    facts: ModelFacts


def scored_steps(measures: Sequence[Step]) -> frozenset[str]:
    """Return the names of the steps whose quality is measured."""
    return frozenset(step.subject for step in measures if step.subject and step.method in SCORING)


def measuring(method: str, values: Mapping[str, Any]) -> StageOptions:
    """Return options of a stage that measures."""
    return stages.load("measure", method).Options.model_validate(values)


def _loaded(engine: str) -> dict[str, Any]:
    """Return how quality is measured: torch models in float32, so that their own rounding is not a part of it."""
    return {"runtime": engine, "dtype": "float32" if engine == "transformers" else "auto"}


def quality_options(engine: str, wanted: PerplexityOptions) -> dict[str, Any]:
    """Return options of `measure quality`."""
    return _loaded(engine) | wanted.model_dump(include={"protocol", "window", "windows", "stride"})


def tasks_options(engine: str, wanted: Sequence[TaskOptions], texts: Mapping[str, TextSource]) -> dict[str, Any]:
    """Return options of `measure tasks`; `texts` has the items of each by its name."""
    fields = {"name", "items", "max_tokens", "stop"}
    asked = [task.model_dump(include=fields) | {"written": _written(texts[task.name])} for task in wanted]
    return _loaded(engine) | {"tasks": asked}


def _written(source: TextSource) -> bool:
    """Return whether answers to a task are written; also of what is none, which is told elsewhere."""
    try:
        return task_items.kind(task_items.read(source.path)) != "choice"
    except InputMissingError:
        return True


def quality_step(
    context: Context, subject: Subject, tokenizer: Found, reference: Step | None, *, keep_logits: bool | None = None
) -> Step:
    """Return the step that scores a model on the recipe's text, compared with `reference` where there is one.

    Without a reference it becomes one, and keeps its logits unless `keep_logits` says otherwise.
    """
    wanted, text = context.recipe.evaluate.perplexity, context.texts["perplexity"]
    assert wanted is not None  # noqa: S101 - the caller has looked
    keep = reference is None if keep_logits is None else keep_logits
    options = quality_options(subject.runtime, wanted) | {"keep_logits": keep}
    return context.step(
        f"measure-quality-{subject.name}",
        ("measure", "quality"),
        measuring("quality", options),
        on=(subject.key, subject.facts),
        found={"text": given(text), "tokenizer": tokenizer} | _baseline(reference),
        subject=subject.name,
        tokens=tokens_of([text]),
    )


def tasks_step(context: Context, subject: Subject, tokenizer: Found, reference: Step | None) -> Step:
    """Return the step that puts the recipe's tasks to a model, compared with `reference` where there is one."""
    wanted = context.recipe.evaluate.tasks
    texts = {f"task:{task.name}": given(context.texts[f"tasks.{task.name}"]) for task in wanted}
    return context.step(
        f"measure-tasks-{subject.name}",
        ("measure", "tasks"),
        measuring(
            "tasks", tasks_options(subject.runtime, wanted, {t.name: context.texts[f"tasks.{t.name}"] for t in wanted})
        ),
        on=(subject.key, subject.facts),
        found={**texts, "tokenizer": tokenizer} | _baseline(reference),
        subject=subject.name,
    )


def _baseline(reference: Step | None) -> dict[str, Found]:
    return {"baseline": Found(key=reference.key)} if reference else {}


def speed_step(
    context: Context,
    options: Mapping[str, Any],
    source: str,
    found: Mapping[str, Found],
    method: str = "speed",
    result: ModelFacts | None = None,
) -> Step:
    """Return the step that times models in turns on the recipe's prompts.

    Args:
        context: The recipe, resolved.
        options: Of the step.
        source: Key of the model that it reads.
        found: What was found for its inputs, by role.
        method: `speed` or `served_speed`.
        result: Facts of what is timed beside the original; it may be larger in memory, as a float32 graph is.
    """
    wanted = context.recipe.evaluate.speed
    prompts = context.texts["prompts" if wanted and wanted.prompts else "perplexity"]
    step = context.step(
        SPEED,
        ("measure", method),
        measuring(method, options),
        on=(source, context.facts),
        found={**found, "prompts": given(prompts)},
    )
    if result is None:
        return step
    other = stages.load("measure", method).estimate(step.options, result, context.target, 0)
    peak = max(step.estimate.peak_bytes, other.peak_bytes)
    return replace(step, estimate=replace(step.estimate, peak_bytes=peak))
