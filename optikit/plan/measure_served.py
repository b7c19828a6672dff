"""The step that measures a model directory as a server serves it: `evaluate: {runtime: vllm}`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from optikit import stages
from optikit.models.facts import ModelFacts
from optikit.plan.context import Context, Found, given, tokens_of
from optikit.plan.measurements import measuring, speed_step
from optikit.plan.model import Step
from optikit.problems import Problem
from optikit.recipe.schema import Evaluate, SpeedOptions

ALONE = "measure-served"
"""Its name where it takes the place of no quality step: nothing is scored, or no stage has changed the weights."""


def served_steps(
    context: Context, steps: Sequence[Step], written: Sequence[Step], original: str, before: Sequence[Step]
) -> Iterator[Step]:
    """Yield the step that serves what the stages wrote last, with what they made for drafting, and times it.

    Args:
        context: The recipe, resolved.
        steps: All steps of it.
        written: Those that wrote a model.
        original: Key of the untouched model; "" is the source itself.
        before: Steps that measure; the first scores the baseline, where perplexity is asked for.
    """
    wanted = context.recipe.evaluate
    source, facts = (written[-1].key, written[-1].after) if written else (original, context.facts)
    scored = written[-1].name if written and wanted.perplexity is not None else ""
    served = context.step(
        f"measure-quality-{scored}" if scored else ALONE,
        ("measure", "served"),
        measuring("served", served_options(wanted)),
        on=(source, facts),
        found=_inputs(context, steps, original, before),
        subject=scored,
        tokens=tokens_of([context.texts["perplexity"]] if wanted.perplexity is not None else []),
    )
    yield served
    if wanted.speed is not None and written:
        yield _speed(context, wanted.speed, served, original)


def _inputs(context: Context, steps: Sequence[Step], original: str, before: Sequence[Step]) -> dict[str, Found]:
    """Return what the step reads beside the model: texts, what was measured before, what was made for drafting."""
    wanted = context.recipe.evaluate
    found = {"tokenizer": Found(key=original)}
    if wanted.perplexity is not None:
        found |= {"baseline": Found(key=before[0].key), "text": given(context.texts["perplexity"])}
    if wanted.speed is not None:
        found["prompts"] = given(context.texts["prompts" if wanted.speed.prompts else "perplexity"])
    speculators = [Found(key=step.key) for step in steps if step.writes == "speculator"]
    return found | ({"speculator": speculators[-1]} if speculators else {})


def _speed(context: Context, wanted: SpeedOptions, served: Step, original: str) -> Step:
    """Return the step that times the result and the untouched model in turns, each on a server of its own."""
    compared = context.recipe.evaluate.baseline.runtime != "none"
    drafting = {"speculator": "speculator"} if "speculator" in served.inputs else {}
    arms = [
        *([{"name": "baseline", "role": "baseline", "runtime": "vllm"}] if compared else []),
        {"name": "result", "role": "result", "runtime": "vllm", **drafting},
    ]
    options = {"arms": arms, **wanted.model_dump(exclude={"prompts"})}
    keys = {"baseline": original, "result": served.source, "tokenizer": original}
    keys |= {"speculator": served.inputs["speculator"]} if drafting else {}
    return speed_step(
        context, options, served.source, {role: Found(key=key) for role, key in keys.items()}, "served_speed"
    )


def served_options(wanted: Evaluate) -> dict[str, Any]:
    """Return options of `measure served`."""
    found: dict[str, Any] = {"scored": wanted.perplexity is not None, "timed": wanted.speed is not None}
    if wanted.perplexity is not None:
        found |= wanted.perplexity.model_dump(include={"protocol", "window", "windows", "stride"})
    if wanted.speed is not None:
        found |= wanted.speed.model_dump(include={"prompt_tokens", "new_tokens"})
        found |= {"requests": wanted.speed.repetitions, "concurrency": wanted.concurrency}
    return found


def problems(context: Context, steps: Sequence[Step]) -> Iterator[Problem]:
    """Yield why the server that a recipe asks for can't measure what its stages write."""
    wanted = context.recipe.evaluate
    if wanted.runtime == "auto":
        return
    at = ("evaluate",)
    if wanted.perplexity is None and wanted.speed is None and wanted.serving is None:
        message = f"runtime {wanted.runtime} is named, and nothing that it could measure"
        fix = "add `perplexity: {text: …}`, `speed: {…}` or `serving: {…}`, or leave runtime out"
        yield Problem(code="nothing-to-serve", message=message, fix=fix, loc=(*at, "runtime"))
        return
    compiled = next((step for step in steps if step.writes == "engine"), None)
    if compiled is not None:
        message = f"{wanted.runtime} serves a model directory, and the last stage compiles for {compiled.method}"
        fix = "leave `runtime` out: a compiled model is measured by its own engine; or remove the compile stage"
        yield Problem(code="compiled-not-served", message=message, fix=fix, loc=(*at, "runtime"))
        return
    facts: ModelFacts = steps[-1].after if steps else context.facts
    stage = stages.load("measure", "served")
    for problem in stage.check(stage.Options.model_validate(served_options(wanted)), facts, context.target):
        yield problem.under(*at)
