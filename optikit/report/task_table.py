"""What tasks show of baseline and result, in words."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optikit import text
from optikit.evaluation.results import Flip, Interval, Report, TaskResult
from optikit.report import wording
from optikit.report.figures import Tone


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One task, baseline and result, every field ready to print; "" is no such value."""

    name: str
    items: str
    baseline: str
    result: str
    change: str = ""
    interval: str = ""
    flips: str = ""
    p_worse: str = ""
    tone: Tone = ""


def rows(report: Report) -> tuple[TaskRow, ...]:
    """Return every task that was put to the baseline or to the result, in the recipe's order."""
    sides = [m.quality.tasks if m.quality else {} for m in (report.baseline, report.result)]
    verdict = report.result.quality.tasks_verdict if report.result.quality else None
    worse = verdict.worse if verdict else ()
    found = [(name, sides[0].get(name), sides[1].get(name)) for name in {**sides[0], **sides[1]}]
    if wording.measured_only(report):
        return tuple(replace(_task(name, old, new, worse=False), baseline="") for name, old, new in found)
    return tuple(_task(name, old, new, worse=name in worse) for name, old, new in found)


def _task(name: str, before: TaskResult | None, after: TaskResult | None, *, worse: bool) -> TaskRow:
    known = after or before
    old, new = (text.percent(each.accuracy) if each else text.UNMEASURED for each in (before, after))
    count = f"{known.items:,}" if known else ""
    row = TaskRow(name=text.clean(name), items=count, baseline=old, result=new)
    if after is None or after.change is None or after.change_ci95 is None:
        return row
    return replace(
        row,
        change=text.points(after.change),
        interval=_points_range(after.change_ci95),
        flips=f"{after.lost} lost, {after.won} won",
        p_worse="" if after.p_worse is None else _p_value(after.p_worse),
        tone="worse" if worse else "same",
    )


def _points_range(ci95: Interval) -> str:
    return f"{text.points(ci95[0]).removesuffix(' points')} to {text.points(ci95[1])}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def sentence(report: Report) -> str:
    """Say what the tasks show together, or that there is nothing to compare."""
    verdict = report.result.quality.tasks_verdict if report.result.quality else None
    if verdict is None:
        return ""
    middle = text.points(verdict.change)
    p = _p_value(verdict.p_worse)
    chance = f"p {p}" if p.startswith("<") else f"p = {p}"
    reach = f"{middle} on average over tasks, 95 % interval {_points_range(verdict.change_ci95)}, {chance}"
    if verdict.conclusion == "no measurable loss":
        return f"No measurable loss: {reach}."
    where = f" on {text.clean(', '.join(verdict.worse))}" if verdict.worse else " taken together"
    return f"Worse{where}: {reach}."


def flips(report: Report) -> tuple[tuple[str, Flip], ...]:
    """Return the examples of items that changed sides, with their task's name."""
    found = report.result.quality.tasks if report.result.quality else {}
    return tuple((text.clean(name), flip) for name, task in found.items() for flip in task.flips)
