"""What gates decided, in words: their names, what each saw, in which unit, and the sentence above them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from optikit import text
from optikit.evaluation.results import GateResult, Report


def sentence(report: Report) -> str:
    """Say what the gates decided and, where one did not pass, which and why."""
    if not report.gates:
        return "No gates were set."
    bad = [gate for gate in report.gates if gate.verdict == report.verdict] if report.verdict != "pass" else []
    if not bad:
        return "The gate passes." if len(report.gates) == 1 else f"All {len(report.gates)} gates pass."
    verb = {"fail": ("fails", "fail"), "inconclusive": ("is inconclusive", "are inconclusive")}[report.verdict]
    count = f"{len(bad)} of {len(report.gates)} gates" if len(report.gates) > 1 else "The gate"
    named = "; ".join(f"{name(g)} is {value(g)}, limit {text.clean(g.limit)}" for g in bad)
    return f"{count} {verb[len(bad) > 1]}: {named}."


_WRITTEN: Sequence[tuple[tuple[str, ...], Callable[[float], str]]] = (
    (("_ratio", "_speedup"), text.ratio),
    (("_change",), text.points),
    (("_agreement", "_accuracy", "_rate"), text.percent),
    (("_mib",), text.memory),
    (("_ms_p50", "_ms_p95"), text.milliseconds),
    (("usd_per_million_output_tokens",), text.dollars),
    (("joules_per_output_token",), text.joules),
)
"""How a gate's number is written, by how its name ends."""


def number(name: str, value: float) -> str:
    """Write a number in the unit that a gate's name carries."""
    return next((write for ends, write in _WRITTEN if name.endswith(ends)), text.number)(value)


def name(gate: GateResult) -> str:
    """Name what a gate limits, and the step after which: "perplexity_ratio after prune wanda"."""
    return text.clean(gate.name) + (f" after {text.step_words(gate.step)}" if gate.step else "")


def value(gate: GateResult) -> str:
    """Write what a gate saw, or why it saw nothing."""
    return text.UNMEASURED if gate.value is None else number(gate.name, gate.value)


def interval(gate: GateResult) -> str:
    """Write the interval of what a gate saw, or nothing."""
    if gate.ci95 is None:
        return ""
    if gate.value is not None and gate.name.endswith(("_ratio", "_speedup")):
        return text.ratio_interval(gate.value, gate.ci95)
    return f"{number(gate.name, gate.ci95[0])} – {number(gate.name, gate.ci95[1])}"


def bounds(report: Report, gate: str, step: str = "") -> tuple[float | None, float | None]:
    """Return the numeric (min, max) of a gate on the result, or after a step, by the recipe; or (None, None)."""
    gates = report.recipe.get("gates")
    limits = gates.get(gate) if isinstance(gates, Mapping) else None
    if step and isinstance(limits, Mapping):
        limits = _limits_after(limits.get("steps"), step)
    if not isinstance(limits, Mapping):
        return None, None
    low, high = (limits.get(end) for end in ("min", "max"))
    return (
        float(low) if isinstance(low, int | float) else None,
        float(high) if isinstance(high, int | float) else None,
    )


def _limits_after(steps: object, step: str) -> object:
    """Return the limits after a step: its key is its name, or verb.method."""
    _, _, rest = step.partition("-")
    keys = (step, rest.replace("-", ".", 1))
    return next((steps[key] for key in keys if key in steps), None) if isinstance(steps, Mapping) else None
