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
    shows: str = ""
    """What the change tells: worse, better or undetermined."""
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
        shows="worse" if worse else _shows(before, after),
        tone="worse" if worse else "better" if after.change_ci95[0] > 0 else "same",
    )


FLOOR = "undetermined: the baseline has too little right for a loss to show"


def _shows(before: TaskResult | None, after: TaskResult) -> str:
    """Word a change that no test calls a loss."""
    if after.change_ci95 is not None and after.change_ci95[0] > 0:
        return "better"
    return FLOOR if before is not None and _at_floor(before, after) else "undetermined"


def _at_floor(before: TaskResult, after: TaskResult) -> bool:
    """Tell whether losing all that the baseline has right is less than such items would show."""
    return after.detectable is not None and before.accuracy < after.detectable


def shows(report: Report) -> str:
    """Say what all tasks together tell: worse, better or undetermined."""
    quality = report.result.quality
    verdict = quality.tasks_verdict if quality else None
    if quality is None or verdict is None:
        return ""
    if verdict.conclusion == "worse":
        return "worse"
    if verdict.change_ci95[0] > 0:
        return "better"
    sides = report.baseline.quality.tasks if report.baseline.quality else {}
    pairs = [(sides[name], after) for name, after in quality.tasks.items() if name in sides]
    return FLOOR if pairs and all(_at_floor(*pair) for pair in pairs) else "undetermined"


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
        said = shows(report)
        return f"{'No measurable loss' if said == 'undetermined' else said.capitalize()}: {reach}."
    where = f" on {text.clean(', '.join(verdict.worse))}" if verdict.worse else " taken together"
    return f"Worse{where}: {reach}."


def flips(report: Report) -> tuple[tuple[str, Flip], ...]:
    """Return the examples of items that changed sides, with their task's name."""
    found = report.result.quality.tasks if report.result.quality else {}
    return tuple((text.clean(name), flip) for name, task in found.items() for flip in task.flips)
