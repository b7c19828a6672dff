"""The step that puts the result under load behind a server: `evaluate: {serving: …}`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from optikit.plan.context import Context, Found, given
from optikit.plan.measurements import measuring
from optikit.plan.model import SERVING, Step
from optikit.problems import Problem
from optikit.store.sources import TextSource


def serving_step(context: Context, result: Step | None, runtime: str, original: str, drafts: dict[str, Found]) -> Step:
    """Return the step.

    Args:
        context: The recipe, resolved.
        result: Step that wrote the result; None where nothing was done to the model.
        runtime: What loads it; `vllm` serves it itself.
        original: Key of the untouched model; "" is the source itself.
        drafts: What its speculation is made of.
    """
    wanted = context.recipe.evaluate.serving
    assert wanted is not None  # noqa: S101 - the caller has looked
    options = wanted.model_dump(exclude={"prompts"})
    served = runtime == "vllm"
    facts = result.after if result else context.facts
    return context.step(
        SERVING,
        ("measure", "served_load" if served else "serving"),
        measuring("served_load", options) if served else measuring("serving", options | {"runtime": runtime}),
        on=(result.key if result else original, facts),
        found={"prompts": given(prompts(context)), "tokenizer": Found(key=original), **drafts},
    )


def prompts(context: Context) -> TextSource:
    """Return what is asked: its own prompts, those of the speed test, or the perplexity text."""
    texts = context.texts
    return next(texts[role] for role in ("serving", "prompts", "perplexity") if role in texts)


def problems(context: Context, measures: Sequence[Step]) -> Iterator[Problem]:
    """Yield why the result can't be loaded, or priced at the number of requests that the recipe says."""
    wanted, concurrency = context.recipe.evaluate.serving, context.recipe.cost.concurrency
    if wanted is not None and all(step.name != SERVING for step in measures):
        message = "serving loads the result, and nothing on this machine serves what the last stage writes"
        fix = "leave serving out, or end the stages with one that is loaded here"
        yield Problem(code="nothing-to-load", message=message, fix=fix, loc=("evaluate", "serving"))
    served = context.recipe.evaluate.runtime == "vllm" and context.recipe.evaluate.speed is not None
    timed = {*(wanted.clients if wanted else ()), *(context.recipe.evaluate.concurrency if served else ())}
    if concurrency > 1 and concurrency not in timed:
        message = f"the result's price is of {concurrency} requests at a time, and no such load is timed"
        fix = f"add {concurrency} to `evaluate: {{serving: {{clients: …}}}}`, or leave concurrency out"
        yield Problem(code="price-not-timed", message=message, fix=fix, loc=("cost", "concurrency"))
