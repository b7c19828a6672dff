"""Names that older reports of the same schema have for facts, and what they are called now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optikit.evaluation.results import Report, StepReport

NOW: Mapping[str, str] = {
    "predicted_alone": "predicted_single_drafter",
    "recall": "ngram",
    "rounded_for_want_of_a_hessian": "rtn_fallback",
    "damped_more": "damping_increased",
    "weights_read_differently": "reader_mismatches",
}
"""Former name of a fact, or of a drafter among the facts → its name."""


def renamed(report: Report) -> Report:
    """Return a report whose facts have today's names, so that old and new ones render and compare alike."""
    return report.model_copy(
        update={
            "speculation": _renamed(report.speculation),
            "steps": tuple(map(_renamed_step, report.steps)),
            "measures": tuple(map(_renamed_step, report.measures)),
        }
    )


def _renamed_step(step: StepReport) -> StepReport:
    return step.model_copy(update={"facts": _renamed(step.facts)})


def _renamed(facts: Any) -> Any:
    """Rename the keys of nested mappings; lists hold measured values and stay."""
    if not isinstance(facts, Mapping):
        return facts
    return {NOW.get(key, key): _renamed(value) for key, value in facts.items()}
