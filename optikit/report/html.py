"""A report as one self-contained page: no JavaScript, nothing fetched, pictures inline, readable on paper and aloud.

Autoescape is on for every template, and `clean` runs on every value before it: a foreign word can be read, not run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from optikit import text
from optikit.evaluation.results import GateResult, Measurement, Report, StepReport
from optikit.report import drawing, figures, gates, load_table, server_table, svg, task_table, wording
from optikit.report import speculation_table as speculating
from optikit.report.definitions import DEFINITIONS, needed
from optikit.report.headline import headline
from optikit.report.values import listed, table

if TYPE_CHECKING:
    import jinja2

NOTHING = Markup("")
_UNIT = re.compile(r"(?<=\d) (?=%|(?:ms|s|min|h|B|[KMGT]iB|tok/s)\b)")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One of the few numbers on top: what changed, by how much, from what to what."""

    label: str
    value: str
    word: str
    interval: str
    before: str
    after: str
    tone: str


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A gate with its picture."""

    result: GateResult
    value: str
    interval: str
    picture: Markup


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number with its bar; `text` is "" where there is no such number."""

    text: str = ""
    bar: Markup = NOTHING


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the waterfall."""

    label: str
    status: str
    kind: str
    time: Cell = Cell()
    memory: Cell = Cell()
    size: Cell = Cell()
    perplexity: Cell = Cell()


MODULES: Mapping[str, Any] = {
    "view": wording,
    "figures": figures,
    "gates_text": gates,
    "tasks": task_table,
    "served": server_table,
    "loads": load_table,
    "text": text,
}
"""What the template calls by name."""


def render(report: Report) -> str:
    """Return the page; one string, UTF-8 when written."""
    return environment().get_template("template.html.j2").render(page=_page(report), report=report, **MODULES)


@cache
def environment() -> jinja2.Environment:
    """Return the templates' environment: everything is escaped and cleaned."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("optikit.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: object) -> object:
    """Clean every string that the template prints, and keep numbers on one line with their units."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNIT.sub("\u00a0", text.clean(value))


def _page(report: Report) -> dict[str, Any]:
    """Return everything the template shows that takes more than a field's name."""
    speculation = report.speculation or {}
    return {
        "headline": headline(report),
        "tiles": tuple(_tiles(report)),
        "gates": tuple(_gate(report, gate, i) for i, gate in enumerate(report.gates)),
        "tradeoff": _tradeoff(report),
        "rows": tuple(_rows(report)),
        "details": tuple(
            (wording.step_label(s), listed(s.options), listed(s.facts)) for s in report.steps if s.options or s.facts
        ),
        "kl": _divergence(report),
        "attribution": table(report.attribution),
        "speculation": speculating.grouped(speculation, drawn=True),
        "speculation_sentence": speculating.sentence(speculation),
        "speculation_pictures": tuple(_speculation_pictures(speculation)),
        "definitions": tuple(DEFINITIONS[key] for key in needed(report) if key in DEFINITIONS),
        "environment": tuple(
            (title, listed(values))
            for title, values in (
                ("Machine", report.host),
                ("Target", report.target),
                ("Model", report.model),
                ("Versions", report.versions),
            )
            if values
        ),
    }


def _tiles(report: Report) -> Iterator[Tile]:
    wanted = {"decode": "Decode speed", "size": "Size", "perplexity": "Perplexity", "peak_memory": "Peak memory"}
    found = {figure.key: figure for group in figures.groups(report) for figure in group.figures if figure.key in wanted}
    for key, label in wanted.items():
        figure = found.get(key)
        if figure is None or not (figure.change or wording.measured_only(report)):
            continue
        if wording.measured_only(report):
            value, _, unit = figure.result.partition(" ")
            yield Tile(label=label, value=value, word=unit, interval="", before="", after="", tone="")
            continue
        value, _, word = figure.change.partition(" ")
        big = value.endswith("×")
        yield Tile(
            label=label,
            value=value if big else figure.change,
            word=(word or "baseline") if big else "",
            interval=figure.interval,
            before=figure.baseline,
            after=figure.result,
            tone=figure.tone,
        )


def _gate(report: Report, gate: GateResult, index: int) -> Gate:
    value, interval = gates.value(gate), gates.interval(gate)
    reach = f", 95 % interval {interval}" if interval else ""
    return Gate(
        result=gate,
        value=value,
        interval=interval,
        picture=svg.interval(
            gate.value,
            gate.ci95,
            gates.bounds(report, gate.name, gate.step),
            gate.verdict,
            ident=f"gate{index}",
            title=f"{gates.name(gate)}: {value}{reach}, limit {gate.limit}: {gate.verdict}",
        ),
    )


def _ratio(measurement: Measurement | None) -> tuple[float | None, tuple[float, float] | None]:
    quality = measurement.quality if measurement else None
    perplexity = quality.perplexity if quality else None
    return (perplexity.ratio, perplexity.ratio_ci95) if perplexity else (None, None)


def _points(report: Report) -> Iterator[svg.Point]:
    before, after = report.baseline.speed, report.result.speed
    for other in report.other_baselines:
        yield svg.Point(label=other.name, speed=other.speed.decode_tokens_per_s, ratio=None, kind="other")
    if before:
        yield svg.Point(
            label=f"baseline: {before.runtime}", speed=before.decode_tokens_per_s, ratio=1.0, kind="baseline"
        )
    for step in report.steps:
        ratio, ci95 = _ratio(step.measurement)
        if step.measurement and step.measurement.speed and step.measurement != report.result:
            speed = step.measurement.speed.decode_tokens_per_s
            yield svg.Point(label=wording.step_label(step), speed=speed, ratio=ratio, ratio_ci95=ci95)
    ratio, ci95 = _ratio(report.result)
    if after:
        speed, decode = after.decode_tokens_per_s, report.speedup.decode
        reach = (speed * decode.ci95[0] / decode.value, speed * decode.ci95[1] / decode.value) if decode else None
        yield svg.Point(label="result", speed=speed, ratio=ratio, speed_ci95=reach, ratio_ci95=ci95, kind="result")


def _tradeoff(report: Report) -> tuple[Markup, tuple[tuple[str, str, str], ...]]:
    """Return the picture of quality against speed and its rows (name, speed, perplexity ratio); empty if unmeasured."""
    points = tuple(_points(report))
    if not any(point.kind == "result" and point.ratio is not None for point in points):
        return NOTHING, ()
    before = next((p.speed for p in points if p.kind == "baseline"), None)
    slowest = gates.bounds(report, "decode_speedup")[0]
    limit = slowest * before if slowest is not None and before is not None else None
    rows = tuple(
        (
            drawing.shortened(p.label, 40),
            f"{text.number(p.speed)} tok/s",
            text.UNMEASURED if p.ratio is None else text.ratio(p.ratio, p.ratio_ci95),
        )
        for p in points
    )
    described = "; ".join(f"{name}: {speed}, perplexity {ratio}" for name, speed, ratio in rows)
    picture = svg.tradeoff(
        points,
        speed_limit=(limit, None),
        ratio_limit=gates.bounds(report, "perplexity_ratio"),
        description=f"Decode speed to the right, perplexity relative to the baseline upwards is better. {described}.",
    )
    return picture, rows


def _rows(report: Report) -> Iterator[Row]:
    """Yield the waterfall: the baseline, every step, every measuring step; nothing where nothing was changed."""
    if wording.measured_only(report):
        return
    steps = (*report.steps, *report.measures)
    seconds = sum(step.seconds for step in steps)
    memory = max((step.peak_memory_mib for step in steps), default=0.0)
    first_size = report.baseline.size_bytes or 0
    largest = max((first_size, *map(wording.size_after, report.steps)))
    worst = _largest_ratio(report)
    yield _baseline_row(report, _sized(first_size, largest, "base"), worst)
    start = 0.0
    for i, step in enumerate(steps):
        changes = step.verb != "measure"
        ratio = _ratio(step.measurement)[0]
        if i == len(report.steps) - 1 and ratio is None:
            ratio = _ratio(report.result)[0]
        yield Row(
            label=wording.step_label(step),
            status=step.status,
            kind="step" if changes else "measure",
            time=_timed(step, start, seconds, f"t{i}"),
            memory=_remembered(step, memory, f"m{i}"),
            size=_sized(wording.size_after(step), largest, f"s{i}") if changes else Cell(),
            perplexity=_compared(ratio, worst, f"p{i}") if changes and ratio is not None else Cell(),
        )
        start += step.seconds


def _largest_ratio(report: Report) -> float:
    """Return the largest perplexity relative to the baseline, of every step and the result; unknown ones count as 1."""
    measured = (*(step.measurement for step in report.steps), report.result)
    return max(_ratio(each)[0] or 1.0 for each in measured)


def _baseline_row(report: Report, size: Cell, worst: float) -> Row:
    known = report.result.quality is not None and report.result.quality.perplexity is not None
    perplexity = _compared(1.0, worst, "base") if known else Cell()
    return Row(label="Baseline", status="", kind="baseline", size=size, perplexity=perplexity)


def _timed(step: StepReport, start: float, total: float, ident: str) -> Cell:
    shown = text.duration(step.seconds)
    title = f"{shown}; estimated {text.duration(step.estimate_seconds)}"
    return Cell(text=shown, bar=svg.bar(start, step.seconds, total, ident=ident, title=title, style=step.status))


def _remembered(step: StepReport, most: float, ident: str) -> Cell:
    shown = text.memory(step.peak_memory_mib)
    title = f"{shown}; estimated {text.memory(step.estimate_peak_memory_mib)}"
    return Cell(text=shown, bar=svg.bar(0, step.peak_memory_mib, most, ident=ident, title=title, style=step.status))


def _sized(size: int, largest: int, ident: str) -> Cell:
    shown = text.size(size)
    return Cell(text=shown, bar=svg.bar(0, size, largest, ident=f"size-{ident}", title=shown))


def _compared(ratio: float, largest: float, ident: str) -> Cell:
    """Show a perplexity ratio with a bar for what is above 1, the loss."""
    shown = text.ratio(ratio)
    loss = svg.bar(0, max(0.0, ratio - 1), largest - 1, ident=f"ratio-{ident}", title=f"{shown} the baseline's")
    return Cell(text=shown, bar=loss)


def _divergence(report: Report) -> dict[str, Any] | None:
    kl = report.result.quality.kl_divergence if report.result.quality else None
    if kl is None:
        return None
    rows = (
        ("median", text.number(kl.median)),
        ("mean", f"{text.number(kl.mean)} ({text.interval(kl.mean_ci95)})"),
        ("90 % of tokens below", text.number(kl.p90)),
        ("99 % of tokens below", text.number(kl.p99)),
        ("largest", text.number(kl.max)),
        ("tokens", f"{kl.tokens:,}"),
    )
    described = "; ".join(f"{name} {value}" for name, value in rows)
    marks = (("median", kl.median), ("mean", kl.mean), ("p99", kl.p99))
    picture = svg.histogram(kl.histogram, marks, description=f"Number of tokens by KL divergence. {described}.")
    return {"rows": rows, "picture": picture, "bins": tuple(_bins(kl.histogram))}


def _bins(histogram: tuple[tuple[float, float, int], ...]) -> Iterator[tuple[str, str, str]]:
    total = sum(count for _, _, count in histogram) or 1
    for low, high, count in histogram:
        yield f"{text.number(low, 2)} – {text.number(high, 2)}", f"{count:,}", text.percent(count / total)


def _speculation_pictures(speculation: Mapping[str, Any]) -> Iterator[tuple[Markup, str]]:
    """Yield (picture, caption) of what can be drawn."""
    drawn = (
        (_gains(speculation), "What acceptance is worth: every prompt judged on, by its tokens per forward pass"),
        (_acceptance(speculation), "How often a draft token is kept, by its position in the draft"),
        (_windows(speculation), "What checking costs: time of a forward pass, in multiples of one token's"),
    )
    yield from (each for each in drawn if each[0])


def _acceptance(speculation: Mapping[str, Any]) -> Markup:
    shares = speculation.get("acceptance_by_position")
    if not isinstance(shares, list | tuple) or not shares or not all(isinstance(s, int | float) for s in shares):
        return NOTHING
    described = ", ".join(f"position {i}: {text.percent(share)}" for i, share in enumerate(shares, 1))
    return svg.columns(shares, ident="acceptance", title="Acceptance by position", description=f"{described}.")


def _windows(speculation: Mapping[str, Any]) -> Markup:
    """Draw what a window of m tokens costs, where that was measured."""
    found = speculation.get("window_ms")
    if not isinstance(found, Mapping) or not found:
        return NOTHING
    if not all(str(m).isdecimal() and isinstance(ms, int | float) and 0 < ms < math.inf for m, ms in found.items()):
        return NOTHING
    times = sorted((int(m), float(ms)) for m, ms in found.items())
    described = ", ".join(f"{m}: {text.milliseconds(ms)}" for m, ms in times)
    return svg.windows(times, description=f"Milliseconds by tokens: {described}.")


def _gains(speculation: Mapping[str, Any]) -> Markup:
    """Draw the speed-up of each prompt against its acceptance length, predicted and measured."""
    rows = speculation.get("by_prompt")
    if not isinstance(rows, list | tuple):
        return NOTHING
    points = sorted(filter(None, map(_gain, rows)))
    if len(points) < 2:
        return NOTHING
    described = "; ".join(f"{text.number(x)}: {text.ratio(y)}, predicted {text.ratio(z)}" for x, y, z in points)
    return svg.gains(points, description=f"Speed-up by acceptance length. {described}.")


def _gain(row: object) -> tuple[float, float, float] | None:
    """Return (acceptance length, speed-up measured, predicted) of one prompt; None for anything else."""
    if not isinstance(row, Mapping):
        return None
    found = [row.get(name) for name in ("acceptance_length", "speedup", "predicted_speedup")]
    length, measured, predicted = (v if isinstance(v, int | float) and 0 < v < math.inf else None for v in found)
    if length is None or measured is None or predicted is None:
        return None
    return float(length), float(measured), float(predicted)
