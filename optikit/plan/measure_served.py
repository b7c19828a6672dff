"""The step that measures a model directory as a server serves it: `evaluate: {runtime: vllm}`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from optikit.models.facts import ModelFacts
from optikit.plan.context import Context, here, tokens_of
from optikit.plan.model import QUALITY, Step
from optikit.problems import Problem
from optikit.recipe.schema import Evaluate, SpeedOptions

ALONE = "measure-served"
"""Its name where it takes the place of no quality step: nothing is scored, or no stage has changed the weights."""


def served_steps(
    context: Context, steps: Sequence[Step], written: Sequence[Step], baseline: str, before: Sequence[Step]
) -> Iterator[Step]:
    """Yield the step that serves what the stages wrote last, with what they made for drafting, and times it.

    Args:
        context: The recipe, resolved.
        steps: All steps of it.
        written: Those that wrote a model.
        baseline: Key of the untouched model; "" is the source itself.
        before: Steps that measure; the first scores the baseline, where perplexity is asked for.
    """
    wanted = context.recipe.evaluate
    stage = context.stage("measure", "served")
    options = stage.Options.model_validate(served_options(wanted))
    source, facts = (written[-1].key, written[-1].after) if written else (baseline, context.facts)
    inputs = {"tokenizer": baseline}
    texts = {}
    if wanted.perplexity is not None:
        inputs["baseline"] = before[0].key
        texts["text"] = context.texts["perplexity"]
    if wanted.speed is not None:
        texts["prompts"] = context.texts["prompts" if wanted.speed.prompts else "perplexity"]
    speculators = [step.key for step in steps if step.verb == "speculate"]
    inputs |= {"speculator": speculators[-1]} if speculators else {}
    parts: dict[str, Any] = {
        "parent": source or context.model.digest,
        "inputs": inputs,
        "texts": {role: text.digest for role, text in texts.items()},
        "host": here(),
    }
    tokens = tokens_of(texts["text"]) if "text" in texts else 0
    served = Step(
        name=f"{QUALITY}{written[-1].name}" if written and wanted.perplexity is not None else ALONE,
        verb="measure",
        method="served",
        options=options,
        key=context.key("measure", "served", options, **parts),
        source=source,
        inputs=inputs,
        files={role: str(text.path) for role, text in texts.items()},
        environment=stage.ENVIRONMENT,
        estimate=stage.estimate(options, facts, context.target, tokens),
        before=facts,
        after=facts,
    )
    yield served
    if wanted.speed is not None and written:
        yield _speed(context, wanted.speed, served, baseline)


def _speed(context: Context, wanted: SpeedOptions, served: Step, baseline: str) -> Step:
    """Return the step that times the result and the untouched model in turns, each on a server of its own."""
    stage = context.stage("measure", "served_speed")
    drafting = {"speculator": "speculator"} if "speculator" in served.inputs else {}
    arms = [
        {"name": "baseline", "role": "baseline", "runtime": "vllm"},
        {"name": "result", "role": "result", "runtime": "vllm", **drafting},
    ]
    options = stage.Options.model_validate({"arms": arms, **wanted.model_dump(exclude={"prompts"})})
    prompts = context.texts["prompts" if wanted.prompts else "perplexity"]
    inputs = {"baseline": baseline, "result": served.source, "tokenizer": baseline}
    inputs |= {"speculator": served.inputs["speculator"]} if drafting else {}
    parts: dict[str, Any] = {
        "parent": context.model.digest,
        "inputs": inputs,
        "prompts": prompts.digest,
        "host": here(),
    }
    return replace(
        served,
        name="measure-speed",
        method="served_speed",
        options=options,
        key=context.key("measure", "served_speed", options, **parts),
        inputs=inputs,
        files={"prompts": str(prompts.path)},
        estimate=stage.estimate(options, context.facts, context.target, 0),
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
    if wanted.perplexity is None and wanted.speed is None:
        message = f"runtime {wanted.runtime} is named, and nothing that it could measure"
        fix = "add `perplexity: {text: …}` or `speed: {…}`, or leave runtime out"
        yield Problem(code="nothing-to-serve", message=message, fix=fix, loc=(*at, "runtime"))
        return
    compiled = next((step for step in steps if step.verb == "compile"), None)
    if compiled is not None:
        message = f"{wanted.runtime} serves a model directory, and the last stage compiles for {compiled.method}"
        fix = "leave `runtime` out: a compiled model is measured by its own engine; or remove the compile stage"
        yield Problem(code="compiled-not-served", message=message, fix=fix, loc=(*at, "runtime"))
        return
    facts: ModelFacts = steps[-1].after if steps else context.facts
    stage = context.stage("measure", "served")
    for problem in stage.check(stage.Options.model_validate(served_options(wanted)), facts, context.target):
        yield problem.under(*at)
