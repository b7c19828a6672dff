"""What gates decided, in words: their names, what each saw, in which unit, and the sentence above them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from optikit import text
from optikit.evaluation.results import GateResult, Report
from optikit.report.judge import is_guessing

Mark = Literal["pass", "lax", "fail", "inconclusive", "emitted"]
"""How a verdict is drawn."""


GUESSING = "perplexity"
"""Name of the gate that a report has only where the result does no better than guessing."""
LOST_A_BIT = 2.0
"""A perplexity of twice the baseline's: one bit more for every token, which no tick may hide."""
MOST_SAID = 4
"""Gates that the sentence names when all pass."""
EMITTED = "Emitted, not judged: nothing was compiled, measured or gated."


def mark(report: Report) -> Mark:
    """Return how a verdict is to be seen: as itself, or as lax where only the gate's generosity lets it pass."""
    return "lax" if is_lax(report) else report.verdict


def verdict(report: Report) -> str:
    """Return the verdict in words."""
    return "emitted, not judged" if report.verdict == "emitted" else report.verdict


def is_lax(report: Report) -> bool:
    """Tell whether a report passes although its predictions are much worse than the baseline's, or mere guesses."""
    perplexity = report.result.quality.perplexity if report.result.quality else None
    lost = perplexity is not None and (perplexity.ratio or 0) >= LOST_A_BIT
    return report.verdict == "pass" and (lost or both_guess(report))


def both_guess(report: Report) -> bool:
    """Tell whether the baseline is no better than guessing, nor the result: no gate fails, and none means anything."""
    vocab = report.model.get("vocab")
    found = [m.quality.perplexity.value for m in (report.baseline, report.result) if m.quality and m.quality.perplexity]
    if not isinstance(vocab, int) or len(found) < 2 or not report.steps:
        return False
    return all(is_guessing(value, vocab) for value in found)


def allowance(report: Report) -> str:
    """Say what loss of quality the gates allowed: "its gate allows 20×"."""
    most = bounds(report, "perplexity_ratio")[1]
    return "no gate limits it" if most is None else f"its gate allows {text.ratio(most)}"


def guessing(gate: GateResult) -> str:
    """Return why a result counts as guessing; "" if this gate isn't about that."""
    return text.clean(gate.reason) if gate.name == GUESSING else ""


def sentence(report: Report) -> str:
    """Say what the gates decided and what they allow; where one did not pass, which and why."""
    if report.verdict == "emitted":
        return EMITTED
    if not report.gates:
        return "No gates were set."
    bad = [gate for gate in report.gates if gate.verdict == report.verdict] if report.verdict != "pass" else []
    if not bad:
        return _all_pass(report.gates)
    verb = {"fail": ("fails", "fail"), "inconclusive": ("is inconclusive", "are inconclusive")}[report.verdict]
    count = f"{len(bad)} of {len(report.gates)} gates" if len(report.gates) > 1 else "The gate"
    named = "; ".join(f"{name(g)} is {value(g)}, limit {text.clean(g.limit)}" for g in bad)
    return f"{count} {verb[len(bad) > 1]}: {named}."


def _all_pass(gates: Sequence[GateResult]) -> str:
    verb = "The gate passes" if len(gates) == 1 else f"All {len(gates)} gates pass"
    named = [f"{name(g)} is {value(g)}, allowed {text.clean(g.limit)}" for g in gates[:MOST_SAID]]
    named += [f"and {len(gates) - MOST_SAID} more"] if len(gates) > MOST_SAID else []
    return f"{verb}: {'; '.join(named)}."


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
