"""Pictures: what is drawn is where the numbers say, inside the frame, and well-formed XML."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.report import drawing, svg

finite = st.floats(min_value=1e-3, max_value=1e6)


def read(picture):
    return ET.fromstring(picture)  # noqa: S314 - our own output


def numbers(root, name):
    return [float(e.get(name)) for e in root.iter() if e.get(name) is not None]


def test_words_are_escaped_in_text_and_attributes():
    drawn = drawing.element("text", '<b a="1">&', class_='x" onload="y')
    assert drawn == '<text class="x&#34; onload=&#34;y">&lt;b a=&#34;1&#34;&gt;&amp;</text>'


@given(st.lists(st.tuples(finite, st.none() | st.floats(min_value=0.2, max_value=50)), min_size=0, max_size=6), finite)
def test_the_tradeoff_is_well_formed_and_its_marks_lie_inside(others, speed):
    points = [svg.Point(label=f"<{i}>" * 9, speed=s, ratio=r, kind="step") for i, (s, r) in enumerate(others)]
    points.append(svg.Point(label="result", speed=speed, ratio=1.1, ratio_ci95=(1.05, 1.2), kind="result"))
    limits = {"speed_limit": (speed / 2, None), "ratio_limit": (None, 1.15)}
    root = read(svg.tradeoff(points, **limits, description="d"))
    for circle in (e for e in root.iter() if e.tag == "circle"):
        assert 58 <= float(circle.get("cx")) <= 544
        assert 26 <= float(circle.get("cy")) <= 336
    assert all(value >= 0 for name in ("width", "height") for value in numbers(root, name))


def test_better_is_up_and_faster_is_right():
    points = [
        svg.Point(label="a", speed=10, ratio=1.0, kind="baseline"),
        svg.Point(label="b", speed=50, ratio=1.2, kind="result"),
    ]
    a, b = (
        e
        for e in read(svg.tradeoff(points, speed_limit=(None, None), ratio_limit=(None, None), description="d")).iter()
        if e.tag == "circle"
    )
    assert float(a.get("cx")) < float(b.get("cx"))
    assert float(a.get("cy")) < float(b.get("cy"))  # y grows downwards


def test_labels_of_neighbours_do_not_cover_each_other():
    points = [svg.Point(label=f"model {i}", speed=100 + i, ratio=1.1 + i / 1000) for i in range(5)]
    points.append(svg.Point(label="far", speed=10, ratio=1.0, kind="baseline"))
    root = read(svg.tradeoff(points, speed_limit=(None, None), ratio_limit=(None, None), description="d"))
    spots = [
        (float(e.get("x")), float(e.get("y")), e.get("text-anchor"))
        for e in root.iter("text")
        if (e.get("class") or "").startswith("name")
    ]
    assert len(set(spots)) == len(spots) == 6


def test_a_bar_starts_and_ends_where_its_numbers_say():
    root = read(svg.bar(25, 50, 200, ident="x", title="t"))
    (bar,) = [e for e in root.iter("rect") if e.get("class") == "bar"]
    assert (float(bar.get("x")), float(bar.get("width"))) == (12.5, 25)
    (none,) = [e for e in read(svg.bar(0, 0, 0, ident="x", title="t")).iter("rect") if e.get("class") == "bar"]
    assert float(none.get("width")) == 0


def test_a_gate_shows_value_interval_and_limit_in_order():
    root = read(svg.interval(1.12, (1.10, 1.14), (None, 1.15), "pass", ident="g", title="t"))
    (dot,) = root.iter("circle")
    (reach,) = [e for e in root.iter("line") if e.get("class") == "ci pass"]
    (limit,) = [e for e in root.iter("line") if e.get("class") == "limit"]
    assert float(reach.get("x1")) < float(dot.get("cx")) < float(reach.get("x2")) < float(limit.get("x1"))
    (allowed,) = [e for e in root.iter("rect") if e.get("class") == "allowed"]
    assert float(allowed.get("x")) + float(allowed.get("width")) == pytest.approx(float(limit.get("x1")), abs=0.02)


def test_a_gate_without_any_number_has_no_picture():
    assert svg.interval(None, None, (None, None), "inconclusive", ident="g", title="t") == ""


@given(st.lists(st.integers(min_value=0, max_value=10**6), min_size=1, max_size=40))
def test_histogram_heights_are_proportional_to_counts(counts):
    bins = [(10.0**i / 1e9, 10.0 ** (i + 1) / 1e9, count) for i, count in enumerate(counts)]
    picture = svg.histogram(bins, (), description="d")
    if not sum(counts):
        assert picture == ""
        return
    heights = [float(e.get("height")) for e in read(picture).iter("rect")]
    for count, height in zip(counts, heights, strict=True):
        assert height == pytest.approx(194 * count / max(counts), abs=0.01)


def test_names_in_the_histogram_stand_on_rows_of_their_own():
    bins = [(10.0**i, 10.0 ** (i + 1), 5) for i in range(-6, 1)]
    marks = [("median", 0.04), ("mean", 0.09), ("p99", 0.9)]
    root = read(svg.histogram(bins, marks, description="d"))
    rows = [float(e.get("y")) for e in root.iter("text") if e.get("class") == "name"]
    assert len(set(rows)) == 3


@pytest.mark.parametrize(("low", "high"), [(0, 203), (0.98, 1.16), (0, 0.003), (0, 1e6)])
def test_ticks_are_few_round_and_inside(low, high):
    found = drawing.ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low <= value <= high for value in found)
    assert all(re.fullmatch(r"[\d.]+", f"{value:.10g}") and len(f"{value:.10g}") <= 7 for value in found)


def test_columns_are_as_high_as_their_shares():
    root = read(svg.columns([1.0, 0.5, 0.0], ident="c", title="t", description="d"))
    heights = [float(e.get("height")) for e in root.iter("rect")]
    assert heights == pytest.approx([144, 72, 0])
