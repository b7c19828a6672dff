"""What gates may limit, by name: a value with its interval, or why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from optikit.evaluation.results import Cost, Interval, Loaded, Measurement, Quality, Speedup
from optikit.plan.check_gates import NEEDS, PRICE
from optikit.report.judge import Value


def of_quality(result: Measurement) -> dict[str, Value]:
    """Return what is limited of quality; the reason stands in place of what was not measured."""
    missing = Value(reason=result.reason or "the result has no quality to compare")
    found = dict.fromkeys((name for name, part in NEEDS.items() if part in ("perplexity", "tasks")), missing)
    quality = result.quality
    if quality is None:
        return found
    if quality.perplexity is not None:
        ratio = quality.perplexity
        reason = quality.reason if ratio.ratio is None else ""
        found["perplexity_ratio"] = Value(value=ratio.ratio, ci95=ratio.ratio_ci95, reason=reason)
    apart = quality.kl_divergence
    found["kl_divergence_mean"] = (
        Value(value=apart.mean, ci95=apart.mean_ci95) if apart else Value(reason=quality.reason)
    )
    reason = quality.reason if quality.top1_agreement is None else ""
    found["top1_agreement"] = Value(value=quality.top1_agreement, ci95=quality.top1_agreement_ci95, reason=reason)
    return found | dict(_task_values(quality))


def of_speed(result: Measurement, ratios: Speedup, intervals: Mapping[str, Interval]) -> dict[str, Value]:
    """Return what is limited of speed and price, one request at a time.

    Args:
        result: What was measured of the result.
        ratios: Against the baseline.
        intervals: Of the result's times, by their names.
    """
    apart = ratios.repeating
    repeats = f"all {apart.prompts} answers repeat themselves: give other prompts" if apart else ""
    missing = Value(reason=result.reason or repeats or "the result was not timed")
    found = {
        f"{what}_speedup": Value(value=ratio.value, ci95=ratio.ci95) if ratio else missing
        for what, ratio in (("decode", ratios.decode), ("prefill", ratios.prefill))
    }
    speed = result.speed
    for name in ("tpot_ms_p50", "ttft_ms_p50", "peak_memory_mib"):
        found[name] = Value(value=getattr(speed, name), ci95=intervals.get(name)) if speed else missing
    if speed is None:
        return found | dict.fromkeys(("joules_per_output_token", PRICE), missing)
    found["joules_per_output_token"] = Value(value=speed.joules_per_output_token, reason=speed.energy_reason)
    found[PRICE] = _priced(result.cost, found["tpot_ms_p50"])
    return found


def of_sizes(size: int | None, before: int | None) -> Value:
    """Return a size as a share of another."""
    return Value(value=size / before) if size is not None and before else Value(reason="the size is not known")


def of_loads(found: Loaded | None, reason: str) -> dict[str, Value]:
    """Return what is limited under load; latencies and goodput are those of the last load that the recipe names.

    Args:
        found: What clients saw.
        reason: Why that is nothing, where it is.
    """
    if found is None:
        missing = Value(reason=reason or "the result was not loaded")
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


def _priced(found: Cost | None, tpot_ms: Value) -> Value:
    """Return the price of output tokens; it grows with the time per token, and so does its interval."""
    if found is None or found.usd_per_million_output_tokens is None:
        return Value(reason=found.reason if found else "the result has no price")
    price_now = found.usd_per_million_output_tokens
    if tpot_ms.value is None or tpot_ms.ci95 is None or found.concurrency > 1:
        return Value(value=price_now)
    low, high = (price_now * end / tpot_ms.value for end in tpot_ms.ci95)
    return Value(value=price_now, ci95=(low, high))


def _task_values(quality: Quality) -> Iterator[tuple[str, Value]]:
    """Yield what gates may limit of the tasks: means over tasks, which weigh the same."""
    tasks = list(quality.tasks.values())
    if not tasks:
        return
    yield "task_accuracy", _mean([(task.accuracy, task.accuracy_ci95) for task in tasks])
    together = quality.tasks_verdict
    if together is None:
        return
    yield "task_accuracy_change", Value(value=together.change, ci95=together.change_ci95)
    yield "task_flip_rate", Value(value=sum(task.flip_rate or 0 for task in tasks) / len(tasks))
    written = [
        (task.output_length_ratio, task.output_length_ratio_ci95)
        for task in tasks
        if task.output_length_ratio is not None and task.output_length_ratio_ci95 is not None
    ]
    missing = Value(reason="no task has written answers")
    yield "output_length_ratio", _mean(written) if written else missing


def _mean(found: Sequence[tuple[float, Interval]]) -> Value:
    """Return the mean of independent values: errors on each side are added in squares."""
    count = len(found)
    value = sum(each for each, _ in found) / count
    below = math.hypot(*(each - ci95[0] for each, ci95 in found)) / count
    above = math.hypot(*(ci95[1] - each for each, ci95 in found)) / count
    return Value(value=value, ci95=(value - below, value + above))
