"""Gates: limits on measurements of the result or after a step, judged with three verdicts.

An interval that lies wholly inside the limit passes, one wholly outside fails, anything else is inconclusive: more
windows or repetitions would tell. A number without an interval is judged as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optikit.problems import Loc, Problem, did_you_mean
from optikit.recipe.schema import step_name
from optikit.report.schema import GateResult, Interval, Verdict

if TYPE_CHECKING:
    from optikit.recipe.schema import Gate, Limit, Recipe
    from optikit.targets import Target

Judged = tuple[GateResult, ...]
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
    "size_ratio": "",
}
"""Which part of `evaluate:` measures what a gate limits; "" is known without measuring."""
PRICE = "usd_per_million_output_tokens"


@dataclass(frozen=True, kw_only=True)
class Value:
    """A measurement that a gate may limit; `reason` says why it is None."""

    value: float | None = None
    ci95: Interval | None = None
    reason: str = ""


@dataclass(frozen=True)
class Asked:
    """One limit of a recipe: on which metric, after which step as the author wrote it ("" is the result)."""

    metric: str
    step: str
    limit: Limit

    @property
    def loc(self) -> Loc:
        """Its place in the recipe."""
        return ("gates", self.metric, "steps", self.step) if self.step else ("gates", self.metric)


def asked(gates: Mapping[str, Gate], on_fail: str = "") -> Iterator[Asked]:
    """Yield every limit of a recipe's gates, the result's before those of steps; `on_fail` picks some of them."""
    for metric, gate in gates.items():
        own = [] if gate.min is None and gate.max is None else [Asked(metric, "", gate)]
        for each in (*own, *(Asked(metric, step, limit) for step, limit in gate.steps.items())):
            if on_fail in ("", each.limit.on_fail):
                yield each


def steps_named(recipe: Recipe, written: str) -> tuple[str, ...]:
    """Return the names of the steps that an author may have meant: one, unless a recipe has a method twice."""
    entries = ((step_name(index, entry), entry) for index, entry in enumerate(recipe.stages))
    return tuple(name for name, entry in entries if written in (name, f"{entry.verb}.{entry.method}"))


Values = Mapping[str, Value]
"""What gates may limit, by metric."""


def judge(
    gates: Mapping[str, Gate] | Iterable[Asked],
    values: Values,
    steps: Mapping[str, tuple[str, Values]] | None = None,
) -> Judged:
    """Judge every limit by the measurement of its metric.

    Args:
        gates: A recipe's gates, or some of their limits.
        values: What was measured of the result.
        steps: By step as the author wrote it: its name, and what was measured after it.
    """
    missing = Value(reason="not measured")
    found = []
    for each in asked(gates) if isinstance(gates, Mapping) else gates:
        name, measured = (steps or {}).get(each.step, (each.step, {})) if each.step else ("", values)
        found.append(_judge(each, name, measured.get(each.metric, missing)))
    return tuple(found)


def _judge(gate: Asked, step: str, found: Value) -> GateResult:
    verdict: Verdict = "inconclusive"
    reason = found.reason
    if found.value is not None:
        interval = found.ci95 or (found.value, found.value)
        verdict = limit_verdict(interval, at_least=gate.limit.min, at_most=gate.limit.max)
        if verdict == "inconclusive":
            reason = f"the interval {interval[0]:.4g} to {interval[1]:.4g} reaches across the limit: measure more"
    return GateResult(
        name=gate.metric,
        step=step,
        limit=said_limit(gate.limit),
        value=found.value,
        ci95=found.ci95,
        verdict=verdict,
        reason=reason,
    )


def limit_verdict(interval: Interval, *, at_least: float | None = None, at_most: float | None = None) -> Verdict:
    """Judge an interval by limits: pass iff all of it is inside, fail iff all of it is beyond one, else inconclusive.

    >>> limit_verdict((1.02, 1.08), at_most=1.1), limit_verdict((1.08, 1.12), at_most=1.1)
    ('pass', 'inconclusive')
    """
    low, high = interval
    if (at_least is not None and high < at_least) or (at_most is not None and low > at_most):
        return "fail"
    inside = (at_least is None or low >= at_least) and (at_most is None or high <= at_most)
    return "pass" if inside and not math.isnan(low + high) else "inconclusive"


def said_limit(gate: Limit) -> str:
    """Return a gate's limit as text: `min 4`, `max 1.15`, `min 0.5, max 0.7`."""
    bounds = (("min", gate.min), ("max", gate.max))
    return ", ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)


def overall(results: Iterable[GateResult]) -> Verdict:
    """Return fail if any gate fails, else inconclusive if any is, else pass; pass without gates."""
    verdicts = {result.verdict for result in results}
    return next((verdict for verdict in ("fail", "inconclusive") if verdict in verdicts), "pass")


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
    if gate.on_fail != "keep_going" and NEEDS.get(name) in ("speed", "tasks"):
        message = f"gate {name} can't {gate.on_fail}: it is measured of the result only"
        yield message, f"leave on_fail out, or limit what is measured after every step: {_after_steps()}"


def _after_steps() -> str:
    return ", ".join(name for name, part in NEEDS.items() if part not in ("speed", "tasks"))


def said(result: GateResult, place: str = "") -> str:
    """Return a judged gate as words: `perplexity_ratio after 1-prune-wanda is 1.31 (1.28 to 1.34), limit max 1.1`.

    Where it is said of the step `place`, that isn't said again.
    """
    reach = f" ({result.ci95[0]:.4g} to {result.ci95[1]:.4g})" if result.ci95 else ""
    value = "unknown" if result.value is None else f"{result.value:.4g}{reach}"
    after = f" after {result.step}" if result.step not in ("", place) else ""
    return f"{result.name}{after} is {value}, limit {result.limit}"


def _obstacles(each: Asked, recipe: Recipe, target: Target | None) -> Iterator[Obstacle]:
    """Yield the first reason why a gate on the result has nothing to judge, and what to change."""
    part = NEEDS.get(each.metric, "")
    if not recipe.stages:
        yield "judges a result, but the recipe has no stages", "add a stage, or remove the gate"
    elif part and not getattr(recipe.evaluate, part):
        yield _left_out(part)
    elif part == "speed" and recipe.stages[-1].verb != "compile":
        yield "limits speed, which is timed on a compiled artifact", "end the stages with `compile`, or remove the gate"
    elif each.metric == PRICE and target is not None and (target.usd_per_hour is None or target.device != "cpu"):
        why = "has no price per hour" if target.usd_per_hour is None else "charges for an accelerator, not timed here"
        fix = "name a target with a price (`optikit targets`), or add a row with usd_per_hour by --targets"
        yield f"limits a price, and target {target.name} {why}", fix


def _step_obstacles(each: Asked, recipe: Recipe, scored: Collection[str] | None) -> Iterator[Obstacle]:
    """Yield the first reason why a gate on a step that exists has nothing to judge, and what to change."""
    part, named = NEEDS.get(each.metric, ""), steps_named(recipe, each.step)
    if len(named) != 1:
        return
    if part in ("speed", "tasks"):
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
