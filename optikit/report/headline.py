"""The sentence above a report: what the run achieved, what it cost, what nobody knows, and who drafts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optikit import text
from optikit.evaluation.results import Report
from optikit.report import gates, task_table
from optikit.report.speculation_table import NAMES, drafters, not_used
from optikit.report.wording import is_one, measured_only, model_name, source_bytes, spans_one

MOST_TASKS = 2
"""Tasks that the headline names; of more it tells the mean."""


def headline(report: Report) -> str:
    """Say in one sentence what the run achieved: "X is 5.2× faster and 3.4× smaller at 1.12× perplexity"."""
    if measured_only(report):
        said = f"{model_name(report)}: {', '.join(_measured(report)) or 'nothing could be measured'}"
    else:
        claims = [claim for claim in (_speed_claim(report), _size_claim(report)) if claim]
        said = f"{model_name(report)} is {' and '.join(claims) or 'unchanged in size'}{_at_perplexity(report)}"
    return text.clean("; ".join((said, *_further(report))))


def _measured(report: Report) -> Iterator[str]:
    """Yield the figures that a model without a baseline is known by."""
    rows = report.served.speed if report.served else ()
    for row in (rows[:1] + rows[-1:])[: len(rows)]:
        at = "alone" if row.concurrency == 1 else f"with {row.concurrency} at a time"
        yield f"{text.per_second(row.output_tokens_per_s)} {at}"
    found = report.result
    if found.speed:
        yield text.per_second(found.speed.decode_tokens_per_s)
    if found.quality and found.quality.perplexity:
        yield f"perplexity {text.number(found.quality.perplexity.value, 4)}"
    if found.quality:
        yield from (f"{text.clean(name)} {text.percent(task.accuracy)}" for name, task in found.quality.tasks.items())
    if found.size_bytes:
        yield text.size(found.size_bytes)


def _speed_claim(report: Report) -> str:
    """Say how much faster decoding is, or that this isn't known; nothing where it wasn't timed."""
    decode = report.speedup.decode
    if decode is None:
        return ""
    if decode.verdict != "no measurable change" and not spans_one(decode.ci95):
        return text.change(decode.value, ("faster", "slower"))
    if is_one(decode.ci95):
        return "as fast as before"
    seen = [m.speed.decode_tokens_per_s for m in (report.baseline, report.result) if m.speed]
    speeds = f"{text.number(seen[0])} → {text.per_second(seen[1])}, " if len(seen) > 1 else ""
    noise = "" if spans_one(decode.ci95) else f", within this machine's noise of ±{100 * decode.noise_floor:.1f} %"
    return f"of undetermined speed ({speeds}{text.ratio_interval(decode.value, decode.ci95)}{noise})"


def _size_claim(report: Report) -> str:
    before, after = report.baseline.size_bytes, report.result.size_bytes
    if not before or not after:
        return ""
    size = text.change(after / before, ("larger", "smaller"))
    than = "" if source_bytes(report) is None else " as unpacked" if size == "unchanged" else " than unpacked"
    return f"{'the same size' if size == 'unchanged' else size}{than}"


def _packed(report: Report) -> Iterator[str]:
    """Compare with the file that the model came in, where that was packed: what its user had before."""
    before, after = source_bytes(report), report.result.size_bytes
    if before and after:
        size = text.change(after / before, ("larger than", "smaller than"))
        yield f"{'as large as' if size == 'unchanged' else size} the {text.size(before)} file that it came in"


def _at_perplexity(report: Report) -> str:
    found = report.result.quality.perplexity if report.result.quality else None
    if found is None or found.ratio is None:
        return ""
    said = f" at {text.ratio(found.ratio)} perplexity"
    if gates.is_lax(report) and not gates.both_guess(report):
        return f"{said} ({gates.allowance(report)})"
    doubtful = found.ratio_ci95 is not None and spans_one(found.ratio_ci95) and not is_one(found.ratio_ci95)
    return f"{said} ({text.ratio_interval(found.ratio, found.ratio_ci95)})" if doubtful and found.ratio_ci95 else said


def _further(report: Report) -> Iterator[str]:
    """Yield what follows the sentence: guessing, tasks, who drafts, what was not measured."""
    failed = [reason for gate in report.gates if (reason := gates.guessing(gate))]
    yield from failed
    if gates.both_guess(report) and not failed:
        yield "it guesses, and so does the model that it was made from"
    if not measured_only(report):
        yield from _packed(report)
        yield from _tasks(report)
    if report.speculation:
        yield from _drafting(report.speculation)
    yield from _apart(report)
    if report.loaded:
        best = max(report.loaded.rows, key=lambda row: row.output_tokens_per_s)
        yield f"up to {text.per_second(best.output_tokens_per_s)} behind {report.loaded.server}"
    if not measured_only(report):
        yield from _missing(report)


def _tasks(report: Report) -> Iterator[str]:
    """Yield the scores of a few tasks, before and after, each with what it shows; of many, the mean."""
    shown = task_table.rows(report)
    if len(shown) <= MOST_TASKS:
        yield from (
            f"{row.name} {row.baseline} → {row.result}{f' ({row.shows})' if row.shows else ''}" for row in shown
        )
        return
    verdict = report.result.quality.tasks_verdict if report.result.quality else None
    change = f" {text.points(verdict.change)} on average ({task_table.shows(report)})" if verdict else " asked"
    yield f"{len(shown)} tasks{change}"


def _drafting(given: Mapping[str, Any]) -> Iterator[str]:
    names = drafters(given)
    asked = given.get("method")
    if names:
        yield f"drafts by {' and '.join(names)}"
    elif given.get("chosen") == "off":
        yield "nothing drafts, for it doesn't pay here"
    if not_used(given):
        yield f"{NAMES[asked]}: not used, 1.00× predicted"


def _apart(report: Report) -> Iterator[str]:
    """Tell of prompts whose answers repeat themselves, which the speed above doesn't contain."""
    apart = report.speedup.repeating
    if apart is None or not apart.repeating:
        return
    if not apart.steady:
        yield f"all {apart.prompts} answers repeat themselves, so its speed is unknown"
        return
    on_them = f": {text.ratio(apart.decode.value)} on them" if apart.decode else ""
    yield f"{apart.repeating} of {apart.prompts} answers repeat themselves and are left out{on_them}"


def _missing(report: Report) -> Iterator[str]:
    quality = report.result.quality
    known = bool(quality and ((quality.perplexity and quality.perplexity.ratio is not None) or quality.tasks))
    missing = [name for name, there in (("speed", report.speedup.decode), ("quality", known)) if not there]
    if missing:
        yield f"its {' and '.join(missing)} {'were' if len(missing) > 1 else 'was'} not measured"
