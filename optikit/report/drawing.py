"""What pictures are drawn of: boxes, axes, lines and words as SVG elements, escaped, without colours.

Every picture is an image with a title and a description for those who can't see it. Sizes are in user units; the page
scales them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

from optikit import text

FONT = 13.0
GLYPH = 0.56 * FONT * 1.15
"""Width that a letter may take; the rest allows for fonts wider than usual."""


@dataclass(frozen=True)
class Box:
    """A rectangle in user units; `top` is above `bottom`."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Say whether two boxes overlap."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        """Say whether this box lies within another."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Axis:
    """Maps values linearly to user units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return where a value lies."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def clamp(self, value: float) -> float:
        """Return where a value lies, or the end of the axis that it is beyond."""
        return self(min(max(value, self.low), self.high))


def element(tag: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """Return one element: attribute values and text are escaped, `Markup` children are kept; `_` becomes `-`."""
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _attribute(value))
        for name, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(child if isinstance(child, Markup) else escape(text.clean(child)) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), written, inner)  # noqa: S704 - tag names are ours


def _attribute(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, int | float) else text.clean(value)


def picture(  # one place that gives every picture its name and description
    children: Iterable[Markup], *, ident: str, title: str, description: str, width: float, height: float, **more: str
) -> Markup:
    """Return an `<svg>` that a screen reader announces by title and description."""
    return element(
        "svg",
        element("title", title, id=f"{ident}-title"),
        element("desc", description, id=f"{ident}-desc"),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{ident}-title {ident}-desc",
        **more,
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round values between `low` and `high`, about as many as asked for.

    >>> ticks(0, 203), ticks(0.98, 1.16, 4)
    ([0.0, 50.0, 100.0, 150.0, 200.0], [1.0, 1.05, 1.1, 1.15])
    """
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def rect(box: Box, style: str) -> Markup:
    """Return a filled box."""
    width, height = max(0.0, box.right - box.left), max(0.0, box.bottom - box.top)
    return element("rect", x=box.left, y=box.top, width=width, height=height, class_=style)


def label(words: str, x: float, y: float, style: str = "", anchor: str = "start") -> Markup:
    """Return words at a place; `anchor` says which of their ends lies there."""
    return element("text", words, x=x, y=y, class_=style or None, text_anchor=anchor)


def shortened(words: str, most: int = 26) -> str:
    """Return `words` cut to `most` characters, with an ellipsis where something is missing."""
    shown = text.clean(words)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"
