"""Curves of load tests: what several servers do as more is asked of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from optikit.evaluation.results import Interval
from optikit.report.drawing import FONT, Axis, Box, element, label, line, picture, shortened, ticks


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a picture of curves: its name, and (x, y, interval of y or None) of each point, by x."""

    name: str
    points: tuple[tuple[float, float, Interval | None], ...]


def curves(lines: Sequence[Curve], *, ident: str, title: str, across: str, up: str, description: str) -> Markup:
    """Draw up to a handful of curves, named at their ends.

    Args:
        lines: At least one, each with a point.
        ident: Of the picture on its page.
        title: Its name.
        across: What the axis across shows.
        up: What the other one shows.
        description: What it shows, in words.
    """
    frame = Box(62, 30, 452, 230)
    xs = [x for each in lines for x, _, _ in each.points]
    ys = [y for each in lines for _, mean, ci95 in each.points for y in (mean, *(ci95 or ()))]
    x = Axis(0, 1.04 * max(xs), frame.left, frame.right)
    y = Axis(0, 1.08 * max(*ys, 1e-9), frame.bottom, frame.top)
    drawn = [label(f"{value:,.10g}", x(value), frame.bottom + 20, "axis", "middle") for value in ticks(0, x.high)]
    for value in ticks(0, y.high, 4):
        drawn += [
            line(frame.left, y(value), frame.right, y(value), "grid"),
            label(f"{value:,.10g}", frame.left - 8, y(value) + 4.5, "axis", "end"),
        ]
    taken: list[float] = []
    for number, curve in enumerate(lines):
        drawn += _curve(curve, x, y, f"line{number % 4}")
        at = y(curve.points[-1][1]) + 4.5
        while any(abs(at - other) < FONT for other in taken):
            at -= FONT
        taken.append(at)
        drawn.append(label(shortened(curve.name, 16), frame.right + 6, at, f"name line{number % 4}"))
    drawn += [
        line(frame.left, frame.bottom, frame.right, frame.bottom, "axis-line"),
        label(f"↑ {up}", 2, 14, "axis-title"),
        label(f"{across} →", frame.right, frame.bottom + 40, "axis-title", "end"),
    ]
    return picture(drawn, ident=ident, title=title, description=description, width=560, height=276, class_="chart")


def _curve(curve: Curve, x: Axis, y: Axis, style: str) -> Iterator[Markup]:
    places = " ".join(f"{x(at):.1f},{y(mean):.1f}" for at, mean, _ in curve.points)
    yield element("polyline", points=places, class_=f"curve {style}")
    for at, mean, ci95 in curve.points:
        if ci95 is not None:
            yield line(x(at), y(ci95[0]), x(at), y(ci95[1]), f"curve {style}")
        yield element("circle", cx=x(at), cy=y(mean), r=3.5, class_=f"dot {style}")
