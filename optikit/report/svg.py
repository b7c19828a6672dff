"""The pictures of a run's report: plain values in, escaped markup out.

Labels are placed where they cover nothing, on the first of a few positions that is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from optikit import text
from optikit.evaluation.results import Interval
from optikit.report.drawing import FONT, GLYPH, Axis, Box, element, label, line, picture, rect, shortened, ticks

Bounds = tuple[float | None, float | None]
"""Lower and upper limit; None is no limit."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One artifact in the picture of quality against speed.

    Attributes:
        label: Its name.
        speed: Tokens per second.
        ratio: Perplexity divided by the baseline's; None is not measured.
        speed_ci95, ratio_ci95: Intervals.
        kind: `baseline`, `step`, `result` or `other`: style of the mark.
    """

    label: str
    speed: float
    ratio: float | None
    speed_ci95: Interval | None = None
    ratio_ci95: Interval | None = None
    kind: str = "step"


def tradeoff(points: Sequence[Point], *, speed_limit: Bounds, ratio_limit: Bounds, description: str) -> Markup:
    """Draw quality against speed: right is faster, up is better; limits shade what gates refuse.

    Points without a perplexity are drawn on the speed axis alone. At least one point needs a perplexity.
    """
    frame = Box(58, 26, 544, 336)
    x, y = _tradeoff_axes(points, speed_limit, ratio_limit, frame)
    drawn = [*_refused(x, y, speed_limit, ratio_limit, frame), *_grid(x, y, frame)]
    placed = [p for p in points if p.ratio is not None]
    path = " ".join(f"{x(p.speed):.1f},{y(p.ratio):.1f}" for p in placed if p.ratio is not None and p.kind != "other")
    drawn.append(element("polyline", points=path, class_="path"))
    taken = [_around(x(p.speed), frame.bottom if p.ratio is None else y(p.ratio), 7) for p in points]
    marks: list[Markup] = []
    for point in points:
        marks += _mark(point, x, y, frame)
        marks.append(_label(point, x, y, frame, taken))
    return picture(
        [*drawn, *marks],
        ident="tradeoff",
        title="Quality against speed",
        description=description,
        width=560,
        height=386,
        class_="chart",
    )


def _tradeoff_axes(points: Sequence[Point], speed_limit: Bounds, ratio_limit: Bounds, frame: Box) -> tuple[Axis, Axis]:
    speeds = [v for p in points for v in (p.speed, *(p.speed_ci95 or ()))] + [v for v in speed_limit if v is not None]
    ratios = [v for p in points for v in (p.ratio, *(p.ratio_ci95 or ())) if v is not None]
    ratios += [1.0, *(v for v in ratio_limit if v is not None)]
    margin = max(0.02, 0.16 * (max(ratios) - min(ratios)))
    return (
        Axis(0.0, 1.12 * max(speeds), frame.left, frame.right),
        Axis(min(ratios) - margin, max(ratios) + margin, frame.top, frame.bottom),
    )


def _refused(x: Axis, y: Axis, speed_limit: Bounds, ratio_limit: Bounds, frame: Box) -> list[Markup]:
    drawn = []
    if speed_limit[0] is not None:
        at = x.clamp(speed_limit[0])
        drawn += [
            rect(Box(frame.left, frame.top, at, frame.bottom), "refused"),
            line(at, frame.top, at, frame.bottom, "limit"),
        ]
        drawn.append(label("gate", at + 4, frame.top + 12, "limit-label"))
    if ratio_limit[1] is not None:
        at = y.clamp(ratio_limit[1])
        drawn += [
            rect(Box(frame.left, at, frame.right, frame.bottom), "refused"),
            line(frame.left, at, frame.right, at, "limit"),
        ]
        drawn.append(label("gate", frame.right - 4, at - 5, "limit-label", "end"))
    return drawn


def _grid(x: Axis, y: Axis, frame: Box) -> list[Markup]:
    drawn = []
    for value in ticks(x.low, x.high):
        drawn += [
            line(x(value), frame.bottom, x(value), frame.bottom + 5, "tick"),
            label(f"{value:,.10g}", x(value), frame.bottom + 20, "axis", "middle"),
        ]
    for value in ticks(y.low, y.high, 4):
        style = "one" if value == 1 else "grid"
        drawn += [
            line(frame.left, y(value), frame.right, y(value), style),
            label(f"{value:.2f}×", frame.left - 8, y(value) + 4.5, "axis", "end"),
        ]
    return [
        *drawn,
        line(frame.left, frame.bottom, frame.right, frame.bottom, "axis-line"),
        label("↑ better: perplexity, × baseline", 2, 14, "axis-title"),
        label("Decode speed, tokens/s: faster →", frame.right, frame.bottom + 42, "axis-title", "end"),
    ]


def _around(x: float, y: float, reach: float) -> Box:
    return Box(x - reach, y - reach, x + reach, y + reach)


def _mark(point: Point, x: Axis, y: Axis, frame: Box) -> list[Markup]:
    at = x(point.speed)
    if point.ratio is None:
        return [element("path", d=f"M{at:.1f} {frame.bottom - 8:.1f}l5 8h-10z", class_=f"mark {point.kind}")]
    height = y(point.ratio)
    drawn = []
    if point.speed_ci95:
        drawn.append(line(x(point.speed_ci95[0]), height, x(point.speed_ci95[1]), height, f"ci {point.kind}"))
    if point.ratio_ci95:
        drawn.append(line(at, y(point.ratio_ci95[0]), at, y(point.ratio_ci95[1]), f"ci {point.kind}"))
    radius = 6 if point.kind == "result" else 4.5
    return [*drawn, element("circle", cx=at, cy=height, r=radius, class_=f"mark {point.kind}")]


def _label(point: Point, x: Axis, y: Axis, frame: Box, taken: list[Box]) -> Markup:
    """Write a point's name on the first of eight positions that covers nothing, and take that place."""
    words = shortened(point.label)
    wide, high = GLYPH * len(words), FONT + 2
    room = Box(frame.left, frame.top - 8, frame.right + 14, frame.bottom)
    spots = _spots(point, x, y, frame)
    boxes = [_text_box(anchor, left, base, wide, high) for anchor, left, base in spots]
    free = (i for i, box in enumerate(boxes) if box.inside(room) and not any(box.meets(other) for other in taken))
    best = next(free, 0)
    taken.append(boxes[best])
    anchor, left, base = spots[best]
    return label(words, left, base, f"name {point.kind}", anchor)


def _spots(point: Point, x: Axis, y: Axis, frame: Box) -> list[tuple[str, float, float]]:
    """Return (anchor, x, y) of the positions for a point's name, the best first."""
    at = x(point.speed)
    if point.ratio is None:
        height = frame.bottom
        return [(anchor, at, height - 14 - 16 * row) for row in range(4) for anchor in ("middle", "start", "end")]
    height = y(point.ratio)
    arm = 11 + (x(point.speed_ci95[1]) - at if point.speed_ci95 else 0)
    spots = [
        ("start", at + arm, height + 4.5),
        ("end", at - arm, height + 4.5),
        ("middle", at, height - 14),
        ("middle", at, height + 23),
        ("start", at + 9, height - 12),
        ("end", at - 9, height - 12),
        ("start", at + 9, height + 21),
        ("end", at - 9, height + 21),
    ]
    if point.ratio == 1:
        return spots[4:] + spots[:4]  # beside it runs the line at 1
    return spots


def _text_box(anchor: str, x: float, y: float, wide: float, high: float) -> Box:
    left = {"start": x, "middle": x - wide / 2, "end": x - wide}[anchor]
    return Box(left, y - high + 3, left + wide, y + 3)


def interval(
    value: float | None, ci95: Interval | None, limit: Bounds, verdict: str, *, ident: str, title: str
) -> Markup:
    """Draw a gate: its allowed range as a band, what was measured as a dot, its interval as a line through it."""
    known = [v for v in (value, *(ci95 or ()), *limit) if v is not None]
    if not known:
        return Markup("")
    axis = _padded(known, 2, 158)
    low, high = limit
    ends = (axis.start if low is None else axis(low), axis.end if high is None else axis(high))
    drawn = [line(axis.start, 14, axis.end, 14, "axis-line"), rect(Box(ends[0], 4, ends[1], 24), "allowed")]
    drawn += [line(at, 2, at, 26, "limit") for at, bound in zip(ends, limit, strict=True) if bound is not None]
    if ci95:
        drawn.append(line(axis(ci95[0]), 14, axis(ci95[1]), 14, f"ci {verdict}"))
    if value is not None:
        drawn.append(element("circle", cx=axis(value), cy=14, r=4.5, class_=f"mark {verdict}"))
    description = "The band is what the gate allows; the dot is the measured value, the line its 95 % interval."
    return picture(
        drawn, ident=ident, title=title, description=description, width=160, height=28, class_="gate-picture"
    )


def _padded(known: Sequence[float], start: float, end: float) -> Axis:
    """Return an axis with all values on it and room on both sides."""
    spread = (max(known) - min(known)) or abs(known[0]) or 1.0
    return Axis(min(known) - 0.35 * spread, max(known) + 0.35 * spread, start, end)


def bar(start: float, length: float, total: float, *, ident: str, title: str, style: str = "") -> Markup:
    """Draw one horizontal bar from `start`, `length` long, on a scale of `total`; it stretches with its cell."""
    scale = 100 / total if total > 0 else 0.0
    left, width = start * scale, max(length * scale, 0.6) if length > 0 else 0.0
    drawn = [
        element("rect", x=0, y=0, width=100, height=8, class_="track"),
        element("rect", x=min(left, 99.4), y=0, width=width, height=8, class_=f"bar {style}".strip()),
    ]
    description = f"A bar from {start / total:.0%} to {(start + length) / total:.0%} of the scale." if total > 0 else ""
    return picture(
        drawn,
        ident=ident,
        title=title,
        description=description,
        width=100,
        height=8,
        class_="bar-picture",
        preserveAspectRatio="none",
    )


def histogram(
    bins: Sequence[tuple[float, float, int]], marks: Sequence[tuple[str, float]], *, description: str
) -> Markup:
    """Draw counts over logarithmic bins (from, to, count); `marks` are named values drawn as lines.

    Bins whose edges aren't above zero, or that are out of order, can't be drawn on a logarithmic axis and are left out.
    """
    usable = [(low, high, count) for low, high, count in bins if 0 < low < high and count >= 0]
    total = sum(count for _, _, count in usable)
    if not total:
        return Markup("")
    frame = Box(8, 56, 552, 250)
    x = Axis(math.log10(usable[0][0]), math.log10(max(high for _, high, _ in usable)), frame.left, frame.right)
    y = Axis(0, max(count for _, _, count in usable), frame.bottom, frame.top)
    drawn = [
        rect(Box(x(math.log10(low)) + 1, y(count), x(math.log10(high)) - 1, frame.bottom), "bar")
        for low, high, count in usable
    ]
    drawn.append(line(frame.left, frame.bottom, frame.right, frame.bottom, "axis-line"))
    drawn += _powers(x, frame)
    drawn += _marked(_placed(marks, x), frame)
    drawn.append(label("nats per token, logarithmic →", frame.right, frame.bottom + 42, "axis-title", "end"))
    return picture(
        drawn,
        ident="kl",
        title="KL divergence per token",
        description=description,
        width=560,
        height=298,
        class_="chart",
    )


def _placed(marks: Sequence[tuple[str, float]], x: Axis) -> list[tuple[str, float]]:
    """Return (name with its value, where it lies) of the marks that lie on a logarithmic axis."""
    shown = [(name, value) for name, value in marks if value > 0 and x.low <= math.log10(value) <= x.high]
    return [(f"{name} {text.number(value)}", x(math.log10(value))) for name, value in shown]


def _powers(x: Axis, frame: Box) -> Iterator[Markup]:
    """Draw a tick at every power of ten, and name about eight of them."""
    for power in range(math.ceil(x.low - 1e-9), math.floor(x.high + 1e-9) + 1):
        at = x(power)
        yield line(at, frame.bottom, at, frame.bottom + 5, "tick")
        if (power - math.ceil(x.low)) % max(1, round((x.high - x.low) / 8)) == 0:
            yield label(_power(power), at, frame.bottom + 21, "axis", "middle")


def _marked(marks: Sequence[tuple[str, float]], frame: Box) -> Iterator[Markup]:
    """Draw named vertical lines, each name on a row of its own, ordered so that no line crosses a name.

    A line begins at its own row. Names run left with the rightmost on top; where the leftmost has no room for that,
    names run right with the leftmost on top.
    """
    leftward = all(at - GLYPH * len(name) > frame.left for name, at in marks)
    for row, (name, at) in enumerate(sorted(marks, key=lambda mark: mark[1], reverse=leftward)):
        height = 12.0 + 16 * row
        yield line(at, height - 9, at, frame.bottom, "mark-line")
        yield label(name, at + (-5 if leftward else 5), height, "name", "end" if leftward else "start")


def _power(exponent: int) -> str:
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def columns(shares: Sequence[float], *, ident: str, title: str, description: str) -> Markup:
    """Draw shares between 0 and 1 as columns, one per position from 1, each with its value on top."""
    frame = Box(8, 26, 552, 170)
    pitch = (frame.right - frame.left) / max(4, len(shares))
    drawn = []
    for i, share in enumerate(shares):
        left, top = frame.left + i * pitch, frame.bottom - max(0.0, min(1.0, share)) * (frame.bottom - frame.top)
        middle = left + pitch / 2
        drawn += [
            rect(Box(left + pitch * 0.16, top, left + pitch * 0.84, frame.bottom), "bar"),
            label(text.percent(share), middle, top - 7, "name", "middle"),
            label(str(i + 1), middle, frame.bottom + 20, "axis", "middle"),
        ]
    drawn += [
        line(frame.left, frame.bottom, frame.right, frame.bottom, "axis-line"),
        label("position of the draft token →", frame.right, frame.bottom + 40, "axis-title", "end"),
    ]
    return picture(drawn, ident=ident, title=title, description=description, width=560, height=216, class_="chart")


def windows(times: Sequence[tuple[int, float]], *, description: str) -> Markup:
    """Draw the time of a forward of m tokens as columns, each with its multiple of the first on top."""
    frame = Box(8, 26, 552, 170)
    pitch = (frame.right - frame.left) / max(4, len(times))
    longest, first = max(ms for _, ms in times), times[0][1]
    drawn = []
    for i, (m, ms) in enumerate(times):
        left, top = frame.left + i * pitch, frame.bottom - ms / longest * (frame.bottom - frame.top)
        middle = left + pitch / 2
        drawn += [
            rect(Box(left + pitch * 0.16, top, left + pitch * 0.84, frame.bottom), "bar"),
            label(f"{ms / first:.1f}", middle, top - 7, "name", "middle"),
            label(str(m), middle, frame.bottom + 20, "axis", "middle"),
        ]
    drawn += [
        line(frame.left, frame.bottom, frame.right, frame.bottom, "axis-line"),
        label("tokens run at once →", frame.right, frame.bottom + 40, "axis-title", "end"),
    ]
    title = "Time of a forward, in multiples of one token's"
    return picture(drawn, ident="windows", title=title, description=description, width=560, height=216, class_="chart")


def gains(points: Sequence[tuple[float, float, float]], *, description: str) -> Markup:
    """Draw speed-up against acceptance length: (tokens per pass, measured, predicted) of each prompt, ascending."""
    frame = Box(58, 30, 544, 230)
    speedups = [value for _, *both in points for value in both]
    low, high = min(1.0, *speedups), max(1.0, *speedups)
    margin = max(0.05, 0.1 * (high - low))
    x = Axis(1.0, max(2.0, 1.05 * points[-1][0]), frame.left, frame.right)
    y = Axis(low - margin, high + margin, frame.bottom, frame.top)
    at = ticks(x.low, x.high)
    drawn = [label(f"{value:,.10g}", x(value), frame.bottom + 20, "axis", "middle") for value in at]
    for value in ticks(y.low, y.high, 4):
        drawn += [
            line(frame.left, y(value), frame.right, y(value), "one" if value == 1 else "grid"),
            label(f"{value:.10g}×", frame.left - 8, y(value) + 4.5, "axis", "end"),
        ]
    for length, measured, predicted in points:
        drawn += [
            line(x(length), y(predicted), x(length), y(measured), "path"),
            element("circle", cx=x(length), cy=y(predicted), r=3.5, class_="mark baseline"),
            element("circle", cx=x(length), cy=y(measured), r=4.5, class_="mark result"),
        ]
    drawn += [
        line(frame.left, frame.bottom, frame.right, frame.bottom, "axis-line"),
        label("↑ speed-up; filled: measured, hollow: predicted", 2, 14, "axis-title"),
        label("tokens per forward pass →", frame.right, frame.bottom + 40, "axis-title", "end"),
    ]
    title = "Speed-up by acceptance length"
    return picture(drawn, ident="gains", title=title, description=description, width=560, height=276, class_="chart")
