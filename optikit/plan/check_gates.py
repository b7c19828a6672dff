"""Gates that a recipe can't judge: nothing measures what they limit, or the step that they name is none."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from optikit.problems import Problem, did_you_mean
from optikit.recipe.limits import Asked, asked, steps_named
from optikit.recipe.schema import step_name

if TYPE_CHECKING:
    from optikit.recipe.schema import Limit, Recipe
    from optikit.targets import Target


Problems = list[Problem]


Obstacle = tuple[str, str]
"""Message, fix."""


NEEDS: Mapping[str, str] = {
    "perplexity_ratio": "perplexity",
    "kl_divergence_mean": "perplexity",
    "top1_agreement": "perplexity",
    "task_accuracy": "tasks",
    "task_accuracy_change": "tasks",
    "task_flip_rate": "tasks",
    "output_length_ratio": "tasks",
    "decode_speedup": "speed",
    "prefill_speedup": "speed",
    "peak_memory_mib": "speed",
    "tpot_ms_p50": "speed",
    "ttft_ms_p50": "speed",
    "usd_per_million_output_tokens": "speed",
    "joules_per_output_token": "speed",
    "serving_tokens_per_s": "serving",
    "serving_ttft_ms_p50": "serving",
    "serving_tpot_ms_p50": "serving",
    "serving_e2e_ms_p50": "serving",
    "serving_good_rate": "serving",
    "serving_error_rate": "serving",
    "size_ratio": "",
}
"""Which part of `evaluate:` measures what a gate limits; "" is known without measuring."""


RATIOS = ("decode_speedup", "prefill_speedup")
"""What needs the baseline's speed."""
LAST = ("speed", "tasks", "serving")
"""Parts of `evaluate:` that measure the result only."""
GOOD = "serving_good_rate"
PRICE = "usd_per_million_output_tokens"


def unmeasurable(recipe: Recipe, *, target: Target | None = None, scored: Collection[str] | None = None) -> Problems:
    """Return a problem for every gate on something that this recipe doesn't measure.

    Args:
        recipe: What to look at.
        target: Where the result will run: it may have no price.
        scored: Names of the steps whose quality is measured; None where that isn't known yet.
    """
    wanted = tuple(asked(recipe.gates))
    problems = [
        Problem(code="unknown-step", message=f"gate {each.metric} {message}", fix=fix, loc=each.loc)
        for each in wanted
        for message, fix in _nameless(each, recipe)
    ]
    problems += [
        Problem(code="gate-not-measured", message=f"gate {each.metric} {message}", fix=fix, loc=each.loc)
        for each in wanted
        for message, fix in (_step_obstacles(each, recipe, scored) if each.step else _obstacles(each, recipe, target))
    ]
    return problems + [
        Problem(code="gate-measured-last", message=message, fix=fix, loc=(*each.loc, "on_fail"))
        for each in wanted
        if not each.step
        for message, fix in _too_late(each.metric, each.limit)
    ]


def _too_late(name: str, gate: Limit) -> Iterator[tuple[str, str]]:
    """Yield why a gate can't do what it should when it fails: it has nothing to judge of the steps before the last."""
    if gate.on_fail != "keep_going" and NEEDS.get(name) in LAST:
        message = f"gate {name} can't {gate.on_fail}: it is measured of the result only"
        yield message, f"leave on_fail out, or limit what is measured after every step: {_after_steps()}"


def _after_steps() -> str:
    return ", ".join(name for name, part in NEEDS.items() if part not in LAST)


def _obstacles(each: Asked, recipe: Recipe, target: Target | None) -> Iterator[Obstacle]:
    """Yield the first reason why a gate on the result has nothing to judge, and what to change."""
    part = NEEDS.get(each.metric, "")
    if not recipe.stages:
        yield "judges a result, but the recipe has no stages", "add a stage, or remove the gate"
    elif part and not getattr(recipe.evaluate, part):
        yield _left_out(part)
    elif part == "speed" and (obstacle := _untimed(each, recipe)):
        yield obstacle
    elif each.metric in (GOOD, PRICE):
        yield from _unsaid(each, recipe, target)


def _unsaid(each: Asked, recipe: Recipe, target: Target | None) -> Iterator[Obstacle]:
    """Yield what a gate needs that the recipe doesn't say: what a good request keeps, or a price."""
    if each.metric == GOOD and recipe.evaluate.serving and not recipe.evaluate.serving.limits.any:
        yield "limits what keeps `serving: {limits: …}`, and there are none", "say for example limits: {ttft_ms: 200}"
    elif each.metric == PRICE and target is not None and (target.usd_per_hour is None or target.device != "cpu"):
        why = "has no price per hour" if target.usd_per_hour is None else "charges for an accelerator, not timed here"
        fix = "say `cost: {usd_per_hour: …}`, or name a target with a price (`optikit targets`)"
        yield f"limits a price, and target {target.name} {why}", fix


def _untimed(each: Asked, recipe: Recipe) -> Obstacle | None:
    """Return why the speed that a gate limits isn't timed, and what to change."""
    if each.metric in RATIOS and recipe.evaluate.baseline.runtime == "none":
        return "compares with a baseline, and the recipe has none", "remove `baseline: {runtime: none}`, or the gate"
    if recipe.stages[-1].stage.WRITES != "engine":
        return (
            "limits speed, which is timed on a compiled artifact",
            "end the stages with `compile`, or remove the gate",
        )
    return None


def _step_obstacles(each: Asked, recipe: Recipe, scored: Collection[str] | None) -> Iterator[Obstacle]:
    """Yield the first reason why a gate on a step that exists has nothing to judge, and what to change."""
    part, named = NEEDS.get(each.metric, ""), steps_named(recipe, each.step)
    if len(named) != 1:
        return
    if part in LAST:
        fix = f"limit it without `steps`, or limit what is measured after every step: {_after_steps()}"
        yield f"can't judge {named[0]}: {part} is measured of the result only", fix
    elif "-speculate-" in named[0]:
        yield f"can't judge {named[0]}: it changes no weights", "name the step before it"
    elif part and not getattr(recipe.evaluate, part):
        yield _left_out(part)
    elif part and scored is not None and named[0] not in scored:
        yield f"can't judge {named[0]}: no runtime on this machine loads what it writes", "name a step before it"


def _left_out(part: str) -> Obstacle:
    message = f"limits what `evaluate: {part}` measures, and the recipe leaves that out"
    return message, f"add `evaluate: {{{part}: …}}`"


def _nameless(each: Asked, recipe: Recipe) -> Iterator[Obstacle]:
    """Yield why a gate doesn't name one step, and what it may have meant."""
    named = steps_named(recipe, each.step)
    if not each.step or len(named) == 1:
        return
    if named:
        yield f"names {each.step!r}, and that is {len(named)} steps", f"choose from {', '.join(named)}"
        return
    stages = [f"{entry.verb}.{entry.method}" for entry in recipe.stages]
    choices = [name for name in stages if stages.count(name) == 1]
    choices += [step_name(index, entry) for index, entry in enumerate(recipe.stages)]
    yield f"names a step {each.step!r} that the recipe doesn't have", did_you_mean(each.step, choices)
