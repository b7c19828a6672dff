"""Gates: limits on measurements, judged with three verdicts.

An interval that lies wholly inside the limit passes, one wholly outside fails, anything else is inconclusive: more
windows or repetitions would tell. A number without an interval is judged as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optikit.problems import Problem
from optikit.report.schema import GateResult, Interval, Verdict

if TYPE_CHECKING:
    from optikit.recipe.schema import Gate, Recipe

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
    "size_ratio": "",
}
"""Which part of `evaluate:` measures what a gate limits; "" is known without measuring."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A measurement that a gate may limit; `reason` says why it is None."""

    value: float | None = None
    ci95: Interval | None = None
    reason: str = ""


def judge(gates: Mapping[str, Gate], values: Mapping[str, Value]) -> tuple[GateResult, ...]:
    """Judge every gate by the measurement of its name."""
    return tuple(_judge(name, gate, values.get(name, Value(reason="not measured"))) for name, gate in gates.items())


def _judge(name: str, gate: Gate, found: Value) -> GateResult:
    verdict: Verdict = "inconclusive"
    reason = found.reason
    if found.value is not None:
        interval = found.ci95 or (found.value, found.value)
        verdict = limit_verdict(interval, at_least=gate.min, at_most=gate.max)
        if verdict == "inconclusive":
            reason = f"the interval {interval[0]:.4g} to {interval[1]:.4g} reaches across the limit: measure more"
    return GateResult(name=name, limit=limit(gate), value=found.value, ci95=found.ci95, verdict=verdict, reason=reason)


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


def limit(gate: Gate) -> str:
    """Return a gate's limit as text: `min 4`, `max 1.15`, `min 0.5, max 0.7`."""
    bounds = (("min", gate.min), ("max", gate.max))
    return ", ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)


def overall(results: Iterable[GateResult]) -> Verdict:
    """Return fail if any gate fails, else inconclusive if any is, else pass; pass without gates."""
    verdicts = {result.verdict for result in results}
    return next((verdict for verdict in ("fail", "inconclusive") if verdict in verdicts), "pass")


def unmeasurable(recipe: Recipe) -> list[Problem]:
    """Return a problem for every gate on something that this recipe doesn't measure."""
    return [
        Problem(code="gate-not-measured", message=f"gate {name} {message}", fix=fix, loc=("gates", name))
        for name in recipe.gates
        for message, fix in _obstacles(name, recipe)
    ] + [
        Problem(code="gate-measured-last", message=message, fix=fix, loc=("gates", name, "on_fail"))
        for name, gate in recipe.gates.items()
        for message, fix in _too_late(name, gate)
    ]


def _too_late(name: str, gate: Gate) -> Iterator[tuple[str, str]]:
    """Yield why a gate can't do what it should when it fails: it has nothing to judge of the steps before the last."""
    if gate.on_fail != "keep_going" and NEEDS.get(name) in ("speed", "tasks"):
        each = ", ".join(other for other, part in NEEDS.items() if part not in ("speed", "tasks"))
        message = f"gate {name} can't {gate.on_fail}: it is measured of the result only"
        yield message, f"leave on_fail out, or limit what is measured after every step: {each}"


def may_stop(gates: Mapping[str, Gate]) -> dict[str, Gate]:
    """Return the gates that end a run at the first step that fails them."""
    return {name: gate for name, gate in gates.items() if gate.on_fail == "stop"}


def may_roll_back(gates: Mapping[str, Gate]) -> dict[str, Gate]:
    """Return the gates that a step's artifact has to pass to be written."""
    return {name: gate for name, gate in gates.items() if gate.on_fail == "rollback"}


def said(result: GateResult) -> str:
    """Return a judged gate as words: `perplexity_ratio is 1.31 (1.28 to 1.34), limit max 1.1`."""
    reach = f" ({result.ci95[0]:.4g} to {result.ci95[1]:.4g})" if result.ci95 else ""
    value = "unknown" if result.value is None else f"{result.value:.4g}{reach}"
    return f"{result.name} is {value}, limit {result.limit}"


def _obstacles(name: str, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the first reason why a gate has nothing to judge, and what to change."""
    part = NEEDS.get(name, "")
    if not recipe.stages:
        yield "judges a result, but the recipe has no stages", "add a stage, or remove the gate"
    elif part and not getattr(recipe.evaluate, part):
        yield (
            f"limits what `evaluate: {part}` measures, and the recipe leaves that out",
            f"add `evaluate: {{{part}: …}}`",
        )
    elif part == "speed" and recipe.stages[-1].verb != "compile":
        yield "limits speed, which is timed on a compiled artifact", "end the stages with `compile`, or remove the gate"
