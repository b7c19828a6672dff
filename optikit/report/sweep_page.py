"""A sweep for people: a sentence, a table that fits a terminal, and a page with the Pareto picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from optikit import text
from optikit.evaluation.sweep_results import Sweep, VariantResult
from optikit.report import html
from optikit.report.pareto_chart import Point, scatter
from optikit.report.values import listed

if TYPE_CHECKING:
    from markupsafe import Markup

NONE = "–"
WIDTH = 80
"""Columns of a terminal that the table fits into."""
HEADER = ("#", "Variant", "Perplexity", "Decode", "Size", "$/M out", "Status")
PAGE_HEADER = (*HEADER[:6], "Against baseline", "Status", "Took", "Where")
LEAST_NAME = 12
FRONT = (
    "On the front: nothing else is at least as good in all figures and measurably better in one. Differences of "
    "perplexity are paired over the same windows, those of speed quotients over the same baseline; noise alone takes "
    "nothing off the front."
)


def numbered(sweep: Sweep) -> list[tuple[int, VariantResult]]:
    """Return the variants with their numbers: the front first, by quality, then what it dominates, then the rest."""

    def place(result: VariantResult) -> tuple[bool, bool, float, str]:
        figures = result.figures
        quality = figures.perplexity_ratio or figures.perplexity or float("inf")
        return (not result.on_front, result.status != "done", quality, result.name)

    return list(enumerate(sorted(sweep.variants, key=place), start=1))


def headline(sweep: Sweep) -> str:
    """Say in one sentence what came out."""
    done = [result for result in sweep.variants if result.status == "done"]
    ended = f"; {sweep.ended}" if sweep.ended else ""
    if not done:
        return text.clean(f"None of {text.plural(len(sweep.variants), 'variant')} has a result{ended}")
    kept = f"{len(sweep.front)} of {text.plural(len(done), 'measured variant')} on the front"
    fastest = max(
        (r for r in done if r.on_front and r.figures.decode_tokens_per_s is not None),
        key=lambda r: r.figures.decode_tokens_per_s or 0.0,
        default=None,
    )
    speed = f"; fastest is {fastest.name}" if fastest and len(sweep.front) > 1 else ""
    return text.clean(f"{kept}{speed}{ended}")


def _figures(result: VariantResult) -> tuple[str, str, str, str]:
    figures = result.figures
    quality = NONE if figures.perplexity is None else text.number(figures.perplexity, 4)
    if figures.perplexity_ratio is not None:
        quality = text.ratio(figures.perplexity_ratio, figures.perplexity_ratio_ci95)
    speed, size, price = figures.decode_tokens_per_s, figures.size_bytes, figures.usd_per_million_output_tokens
    return (
        quality,
        NONE if speed is None else f"{text.number(speed)} tok/s",
        NONE if size is None else text.size(size),
        NONE if price is None else text.dollars(price),
    )


def _status(result: VariantResult) -> str:
    """Say in a word what became of a variant."""
    if result.status != "done":
        return result.status
    place = "front" if result.on_front else "dominated"
    return place if result.verdict in ("pass", "emitted", None) else f"{place}, {result.verdict}"


def terminal(sweep: Sweep) -> str:
    """Return what a terminal shows: at most 80 columns, names shortened where they have to be."""
    rows: list[tuple[str, ...]] = [
        HEADER,
        *(
            (str(number), text.clean(result.name), *_figures(result), _status(result))
            for number, result in numbered(sweep)
        ),
    ]
    rows = _without_empty(rows)
    at = rows[0].index("Variant")
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = WIDTH - sum(wide) + wide[at] - 2 * (len(wide) - 1)
    wide[at] = max(LEAST_NAME, min(wide[at], left))
    lines = []
    for row in rows:
        cells = [_cut(cell, width).ljust(width) for cell, width in zip(row, wide, strict=True)]
        lines.append("  ".join(cells).rstrip()[:WIDTH])
    reasons = [
        _cut(f"{number}: {text.clean(result.reason)}", WIDTH)
        for number, result in numbered(sweep)
        if result.reason and result.status in ("refused", "failed")
    ]
    return "\n".join([*_wrapped(headline(sweep)), "", *lines, *([""] if reasons else []), *reasons])


def _without_empty(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return a table without the columns in which no row has a figure."""
    kept = [i for i in range(len(rows[0])) if any(row[i] != NONE for row in rows[1:])]
    return [tuple(row[i] for i in kept) for row in rows]


def _cut(words: str, width: int) -> str:
    return words if len(words) <= width else f"{words[: width - 1]}…"


def _wrapped(words: str) -> list[str]:
    import textwrap

    return textwrap.wrap(words, WIDTH, break_on_hyphens=False)


def notes(sweep: Sweep) -> tuple[str, ...]:
    """Say how figures are to be read."""
    runs = text.duration(sweep.busy_seconds)
    found = [
        FRONT,
        f"{sweep.steps_made} steps were made and {sweep.steps_found} found made, of {len(sweep.variants)} variants.",
        f"It took {text.duration(sweep.spent_seconds)}; its runs together {runs}.",
    ]
    if sweep.spent_usd is not None and sweep.usd_per_hour is not None:
        nodes = text.plural(len(sweep.nodes), "node")
        found.append(f"{text.dollars(sweep.spent_usd)}: {nodes} at {text.dollars(sweep.usd_per_hour)} an hour.")
    if sweep.ended:
        found.append(f"Ended early: {sweep.ended}. The same command goes on.")
    return tuple(found)


def render_html(sweep: Sweep) -> str:
    """Return the page."""
    rows = numbered(sweep)
    return (
        html.environment()
        .get_template("sweep.html.j2")
        .render(
            sweep=sweep,
            headline=headline(sweep),
            pictures=tuple(_pictures(rows)),
            header=PAGE_HEADER,
            rows=[(result, _page_row(number, result)) for number, result in rows],
            values=[(number, _values(result)) for number, result in rows],
            notes=notes(sweep),
            about=_about(sweep),
            text=text,
        )
    )


def _page_row(number: int, result: VariantResult) -> tuple[str, ...]:
    figures = result.figures
    speedup = NONE
    if figures.decode_speedup is not None and figures.decode_speedup_ci95 is not None:
        speedup = text.ratio(figures.decode_speedup, figures.decode_speedup_ci95)
        speedup += f" ({text.ratio_interval(figures.decode_speedup, figures.decode_speedup_ci95)})"
    took = text.duration(result.seconds) if result.seconds else NONE
    return (str(number), result.name, *_figures(result), speedup, _status(result), took, result.node or NONE)


def _values(result: VariantResult) -> str:
    said = ", ".join(f"{path}: {json.dumps(value, ensure_ascii=False)}" for path, value in result.values.items())
    return f"{result.name}: {said}" + (f". {result.status.capitalize()}: {result.reason}" if result.reason else "")


def _about(sweep: Sweep) -> tuple[tuple[str, str], ...]:
    asked = f"{sweep.search}, seed {sweep.seed}" + (f", budget {sweep.budget}" if sweep.budget else "")
    return (("Recipe", sweep.recipe), ("Search", asked), ("Nodes", "; ".join(sweep.nodes)), *listed(sweep.host))


Figure = Callable[[VariantResult], float | None]


def _quality(result: VariantResult) -> float | None:
    return result.figures.perplexity_ratio or result.figures.perplexity


def _speed(result: VariantResult) -> float | None:
    return result.figures.decode_tokens_per_s


def _size(result: VariantResult) -> float | None:
    return None if result.figures.size_bytes is None else result.figures.size_bytes / 2**20


def _price(result: VariantResult) -> float | None:
    return result.figures.usd_per_million_output_tokens


def _pictures(rows: Sequence[tuple[int, VariantResult]]) -> Iterator[Markup]:
    """Yield a picture of quality against speed, size and price, of each that was measured of two variants."""
    drawn: tuple[tuple[str, str, Figure], ...] = (
        ("Speed", "decode speed, tokens per second", _speed),
        ("Size", "size of the weights, MiB", _size),
        ("Price", "$ per million output tokens", _price),
    )
    for title, up, figure in drawn:
        points = [
            Point(
                number=number,
                name=result.name,
                x=quality,
                y=value,
                size=result.figures.size_bytes or 0,
                on_front=result.on_front,
            )
            for number, result in rows
            if (quality := _quality(result)) is not None and (value := figure(result)) is not None
        ]
        if len(points) > 1:
            words = (
                f"{title} of {len(points)} variants over their perplexity; what nothing dominates is coloured, "
                "the area of a circle is the size of the weights; the table has the numbers."
            )
            yield scatter(
                points,
                ident=f"pareto-{title.lower()}",
                title=f"{title} and quality",
                across="perplexity, as a multiple of the baseline's where that was measured",
                up=up,
                description=words,
            )
