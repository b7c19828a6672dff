"""The picture of a sweep: what a variant costs in quality against what it gains, dominated ones greyed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from optikit.report.drawing import FONT, Axis, Box, element, label, line, picture, ticks

SMALLEST, LARGEST = 4.0, 15.0
"""Radius of a point, by the size of the weights."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A variant.

    Attributes:
        number: What it is called in the picture and in the table.
        name: What it is called elsewhere.
        x, y: Its figures.
        size: What the area of its circle shows.
        on_front: Whether nothing dominates it.
    """

    number: int
    name: str
    x: float
    y: float
    size: float
    on_front: bool


def scatter(points: Sequence[Point], *, ident: str, title: str, across: str, up: str, description: str) -> Markup:
    """Draw points, the front on top of what it dominates, each with its number.

    Args:
        points: At least one.
        ident: Of the picture on its page.
        title: Its name.
        across: What the axis across shows.
        up: What the other one shows.
        description: What it shows, in words.
    """
    frame = Box(70, 30, 540, 270)
    x = _axis([each.x for each in points], frame.left, frame.right)
    y = _axis([each.y for each in points], frame.bottom, frame.top)
    drawn = []
    for value in ticks(x.low, x.high):
        drawn += [
            line(x(value), frame.top, x(value), frame.bottom, "grid"),
            label(f"{value:,.10g}", x(value), frame.bottom + 20, "axis", "middle"),
        ]
    for value in ticks(y.low, y.high, 4):
        drawn += [
            line(frame.left, y(value), frame.right, y(value), "grid"),
            label(f"{value:,.10g}", frame.left - 8, y(value) + 4.5, "axis", "end"),
        ]
    most = max(each.size for each in points) or 1.0
    for each in sorted(points, key=lambda point: (point.on_front, -point.size)):
        radius = max(SMALLEST, LARGEST * (each.size / most) ** 0.5)
        style = "front" if each.on_front else "dominated"
        circle = element(
            "circle", element("title", each.name), cx=x(each.x), cy=y(each.y), r=radius, class_=f"variant {style}"
        )
        drawn.append(circle)
    drawn += _numbers(points, x, y, frame)
    drawn += [
        line(frame.left, frame.bottom, frame.right, frame.bottom, "axis-line"),
        label(f"↑ {up}", 2, 14, "axis-title"),
        label(f"{across} →", frame.right, frame.bottom + 40, "axis-title", "end"),
    ]
    return picture(drawn, ident=ident, title=title, description=description, width=560, height=316, class_="chart")


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    low, high = min(values), max(values)
    margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - margin, high + margin, start, end)


def _numbers(points: Sequence[Point], x: Axis, y: Axis, frame: Box) -> list[Markup]:
    """Return the numbers beside their points, each where no other is, the front's first."""
    taken: list[Box] = []
    drawn = []
    for each in sorted(points, key=lambda point: (not point.on_front, point.number)):
        wide = 0.62 * FONT * len(str(each.number))
        for dx, dy in ((9, -7), (9, 15), (-9 - wide, -7), (-9 - wide, 15), (16, 4), (-16 - wide, 4)):
            left, base = x(each.x) + dx, y(each.y) + dy
            box = Box(left, base - FONT, left + wide, base + 2)
            if box.inside(frame) and not any(box.meets(other) for other in taken):
                taken.append(box)
                drawn.append(label(str(each.number), left, base, "name" if each.on_front else "axis"))
                break
    return drawn
