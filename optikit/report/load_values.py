"""What gates may limit of a result under load."""

from __future__ import annotations

from collections.abc import Mapping

from optikit.evaluation.results import Interval, Loaded
from optikit.plan.check_gates import NEEDS
from optikit.report.judge import Value


def values(found: Loaded | None, missing: Value) -> Mapping[str, Value]:
    """Return them by name; latencies and goodput are those of the last load that the recipe names.

    Args:
        found: What clients saw.
        missing: Why that is nothing, where it is.
    """
    if found is None:
        return {name: missing for name, part in NEEDS.items() if part == "serving"}
    last = found.rows[-1]
    asked = sum(row.requests for row in found.rows)
    return {
        "serving_tokens_per_s": Value(value=max(row.output_tokens_per_s for row in found.rows)),
        "serving_ttft_ms_p50": _timed(last.ttft_ms_p50, last.ttft_ms_p50_ci95, last.reason),
        "serving_tpot_ms_p50": _timed(last.tpot_ms_p50, last.tpot_ms_p50_ci95, last.reason),
        "serving_e2e_ms_p50": _timed(last.e2e_ms_p50, None, last.reason),
        "serving_good_rate": Value(value=last.good_share, reason="" if found.limits.any else last.reason),
        "serving_error_rate": Value(value=sum(row.errors for row in found.rows) / asked),
    }


def _timed(value: float | None, ci95: Interval | None, reason: str) -> Value:
    return Value(value=value, ci95=ci95, reason=reason if value is None else "")
