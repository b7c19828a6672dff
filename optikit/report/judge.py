"""Gates: limits on measurements of the result or after a step, judged with three verdicts.

An interval that lies wholly inside the limit passes, one wholly outside fails, anything else is inconclusive: more
windows or repetitions would tell. A number without an interval is judged as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optikit.evaluation.results import GateResult, GateVerdict, Interval, Verdict
from optikit.recipe.limits import Asked, asked

if TYPE_CHECKING:
    from optikit.recipe.schema import Gate, Limit

Judged = tuple[GateResult, ...]


@dataclass(frozen=True, kw_only=True)
class Value:
    """A measurement that a gate may limit; `reason` says why it is None."""

    value: float | None = None
    ci95: Interval | None = None
    reason: str = ""


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
    verdict: GateVerdict = "inconclusive"
    reason = found.reason
    if found.value is not None:
        interval = found.ci95 or (found.value, found.value)
        verdict = limit_verdict(interval, at_least=gate.limit.min, at_most=gate.limit.max)
        if verdict == "inconclusive":
            reason = f"the interval {interval[0]:.4g} to {interval[1]:.4g} reaches across the limit: measure more"
    return GateResult(
        name=gate.metric,
        step=step,
        limit=describe_limit(gate.limit),
        value=found.value,
        ci95=found.ci95,
        verdict=verdict,
        reason=reason,
    )


def limit_verdict(interval: Interval, *, at_least: float | None = None, at_most: float | None = None) -> GateVerdict:
    """Judge an interval by limits: pass iff all of it is inside, fail iff all of it is beyond one, else inconclusive.

    >>> limit_verdict((1.02, 1.08), at_most=1.1), limit_verdict((1.08, 1.12), at_most=1.1)
    ('pass', 'inconclusive')
    """
    low, high = interval
    if (at_least is not None and high < at_least) or (at_most is not None and low > at_most):
        return "fail"
    inside = (at_least is None or low >= at_least) and (at_most is None or high <= at_most)
    return "pass" if inside and not math.isnan(low + high) else "inconclusive"


def describe_limit(gate: Limit) -> str:
    """Return a gate's limit as text: `min 4`, `max 1.15`, `min 0.5, max 0.7`."""
    bounds = (("min", gate.min), ("max", gate.max))
    return ", ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)


def overall(results: Iterable[GateResult], *, known: bool = True) -> Verdict:
    """Return fail if any gate fails, else inconclusive if any is, else pass.

    Without gates: pass, or emitted where nothing is `known` of the result.
    """
    verdicts = {result.verdict for result in results}
    if not verdicts and not known:
        return "emitted"
    return next((verdict for verdict in _WORST_FIRST if verdict in verdicts), "pass")


_WORST_FIRST: tuple[GateVerdict, ...] = ("fail", "inconclusive")

GUESSING = 0.9
"""Share of the vocabulary's size from which a perplexity is that of guessing: random weights had 0.96 to 1.03 of it."""
UNIFORM = 1e-4
"""How near to the vocabulary's size a perplexity comes when every token gets the same logit."""


def is_guessing(perplexity: float, vocab: int) -> bool:
    """Tell whether a perplexity per token is no better than that of picking one of `vocab` tokens blindly.

    >>> is_guessing(258.8, 260), is_guessing(18.2, 49152)
    (True, False)
    """
    return perplexity >= GUESSING * vocab


def guessing(perplexity: float, baseline: float | None, vocab: int) -> GateResult | None:
    """Judge a model that guesses: it fails, however near its perplexity is to the baseline's.

    None where it doesn't guess, or where the baseline guesses as well and the logits still tell tokens apart: random
    weights, on which a stack is tried.
    """
    if not is_guessing(perplexity, vocab):
        return None
    uniform = abs(perplexity / vocab - 1) < UNIFORM
    if not uniform and baseline is not None and is_guessing(baseline, vocab):
        return None
    why = "every token gets the same logit" if uniform else "no better than picking tokens blindly"
    return GateResult(
        name="perplexity",
        limit=f"below {vocab:,}, that of guessing",
        value=perplexity,
        ci95=None,
        verdict="fail",
        reason=f"it guesses: a perplexity of {perplexity:,.4g} with {vocab:,} tokens is chance, {why}",
    )


def describe(result: GateResult, place: str = "") -> str:
    """Return a judged gate as words: `perplexity_ratio after 1-prune-wanda is 1.31 (1.28 to 1.34), limit max 1.1`.

    Where it is said of the step `place`, that isn't said again.
    """
    reach = f" ({result.ci95[0]:.4g} to {result.ci95[1]:.4g})" if result.ci95 else ""
    value = "unknown" if result.value is None else f"{result.value:.4g}{reach}"
    after = f" after {result.step}" if result.step not in ("", place) else ""
    return f"{result.name}{after} is {value}, limit {result.limit}"
