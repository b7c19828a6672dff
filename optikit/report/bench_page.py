"""bench.json, samples.jsonl, bench.md and bench.html: a load test for programs and for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optikit import text
from optikit.evaluation.bench_results import Bench, Row, Sample
from optikit.report import html, load_curves, markdown
from optikit.report.values import listed
from optikit.report.write import put

if TYPE_CHECKING:
    from markupsafe import Markup

HEADER = ("Variant", "Load", "Requests", "Errors", "TTFT, ms", "TPOT, ms", "E2E, ms", "Tokens/s", "Good", "$ per M out")
SAME_HEADER = ("Variant", "Prompts", "Same first token", "Same answer")
NONE = "–"


def write(bench: Bench, samples: Sequence[Sample], out: Path) -> None:
    """Write all of it into `out`, which is made where missing.

    Raises:
        CannotCreateError: `out` can't be made or written to.
        DiskError: The disk is full or fails.
    """
    put(out / "samples.jsonl", "".join(f"{each.model_dump_json()}\n" for each in samples))
    put(out / "bench.json", bench.model_dump_json(indent=2) + "\n")
    put(out / "bench.md", render_markdown(bench))
    put(out / "bench.html", render_html(bench))


def headline(bench: Bench) -> str:
    """Say in one sentence what came out."""
    best = max(bench.rows, key=lambda row: row.output_tokens_per_s)
    found = f"{best.variant} writes up to {text.number(best.output_tokens_per_s)} tokens per second, {_load(best)}"
    others = []
    for variant in bench.variants:
        if variant.name != best.variant:
            most = max(row.output_tokens_per_s for row in bench.rows if row.variant == variant.name)
            others.append(f"{text.ratio(best.output_tokens_per_s / max(most, 1e-9))} {variant.name}")
    return text.clean(found + (f": {', '.join(others)} at its best" if others else ""))


def _load(row: Row) -> str:
    return f"{row.load:g} at a time" if row.kind == "clients" else f"{row.load:g} requests/s"


def _rows(bench: Bench) -> Iterator[tuple[str, ...]]:
    for row in bench.rows:
        yield (
            row.variant,
            _load(row),
            str(row.requests),
            str(row.errors),
            _timed(row.ttft_ms_p50, row.ttft_ms_p50_ci95),
            _timed(row.tpot_ms_p50, row.tpot_ms_p50_ci95),
            _timed(row.e2e_ms_p50, None),
            text.number(row.output_tokens_per_s),
            NONE if row.good_share is None else text.percent(row.good_share),
            NONE if row.usd_per_million_output_tokens is None else text.dollars(row.usd_per_million_output_tokens),
        )


def _timed(value: float | None, ci95: tuple[float, float] | None) -> str:
    if value is None:
        return NONE
    spread = f" ({text.number(ci95[0])}–{text.number(ci95[1])})" if ci95 is not None else ""
    return text.number(value) + spread


def _same(bench: Bench) -> Iterator[tuple[str, ...]]:
    for each in bench.identity:
        share = [
            text.percent(count / each.prompts) if each.prompts else NONE for count in (each.first_token, each.whole)
        ]
        yield (each.variant, str(each.prompts), *share)


def notes(bench: Bench) -> tuple[str, ...]:
    """Say how figures are to be read."""
    found = [
        "TTFT: time to the first token, TPOT: time per token after it, E2E: to the last; medians with 95 % intervals.",
        "Times count from when a request was due, not from when a client got round to it.",
        "At a time: each client asks again when it is answered. Requests/s: at random times, whatever comes back.",
    ]
    if not bench.end_of_text_ignored:
        found.append("Texts ended where a model ended them: variants may have written different lengths.")
    if bench.usd_per_hour is None:
        found.append("No price: say what the machine costs with --usd-per-hour.")
    limits = ((bench.limits.ttft_ms, "TTFT"), (bench.limits.tpot_ms, "TPOT"), (bench.limits.e2e_ms, "end to end"))
    kept = [f"{name} ≤ {text.milliseconds(most)}" for most, name in limits if most is not None]
    found.append(f"Good: {', '.join(kept)}." if kept else "No limits: say with --ttft-ms and others what is good.")
    return tuple(found)


def _about(bench: Bench) -> tuple[tuple[str, str], ...]:
    asked = f"{bench.prompts} prompts in turn, {bench.new_tokens} tokens each unless a prompt says otherwise"
    variants = [
        (each.name, f"{each.model} at {each.url}{', served for this' if each.started_here else ''}")
        for each in bench.variants
    ]
    return (*variants, ("Asked", asked), ("Took", text.duration(bench.seconds)), *listed(bench.host))


def render_markdown(bench: Bench) -> str:
    """Return the page as Markdown."""
    rows = [[markdown.escape(cell) for cell in row] for row in _rows(bench)]
    lines = [f"## {markdown.escape(headline(bench))}", "", *markdown.table(HEADER, rows, "l" + 9 * "r"), ""]
    same = [[markdown.escape(cell) for cell in row] for row in _same(bench)]
    if same:
        lines += [*markdown.table(SAME_HEADER, same, "lrrr"), ""]
    lines += [f"- {markdown.escape(note)}" for note in notes(bench)]
    lines += [f"- {markdown.escape(name)}: {markdown.escape(value)}" for name, value in _about(bench)]
    return "\n".join([*lines, "", markdown.code(bench.command), ""])


def terminal(bench: Bench) -> str:
    """Return what a terminal shows: a table as wide as it has to be."""
    table = [HEADER, *_rows(bench)]
    shown = [[text.clean(cell) for cell in row] for row in table]
    wide = [max(len(row[i]) for row in shown) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip() for row in shown]
    return "\n".join([headline(bench), "", *lines])


def render_html(bench: Bench) -> str:
    """Return the page."""
    template = html.environment().get_template("bench.html.j2")
    return template.render(
        bench=bench,
        headline=headline(bench),
        pictures=tuple(_pictures(bench)),
        header=HEADER,
        rows=tuple(_rows(bench)),
        same_header=SAME_HEADER,
        same=tuple(_same(bench)),
        notes=notes(bench),
        about=_about(bench),
        text=text,
    )


def _pictures(bench: Bench) -> Iterator[Markup]:
    """Yield curves over the load, of what was measured at two loads at least."""
    drawn: tuple[tuple[str, str, Callable[[Row], float | None], Callable[[Row], tuple[float, float] | None]], ...] = (
        ("Throughput", "output tokens per second", lambda row: row.output_tokens_per_s, lambda _: None),
        ("Time to first token", "ms", lambda row: row.ttft_ms_p50, lambda row: row.ttft_ms_p50_ci95),
        ("Time per output token", "ms", lambda row: row.tpot_ms_p50, lambda row: row.tpot_ms_p50_ci95),
        ("Price", "$ per million output tokens", lambda row: row.usd_per_million_output_tokens, lambda _: None),
    )
    for kind, across in (("clients", "clients at a time"), ("rate", "requests per second")):
        for title, up, value, ci95 in drawn:
            lines = []
            for variant in bench.variants:
                rows = sorted(
                    (r for r in bench.rows if r.variant == variant.name and r.kind == kind), key=lambda r: r.load
                )
                points = tuple((row.load, found, ci95(row)) for row in rows if (found := value(row)) is not None)
                if len(points) > 1:
                    lines.append(load_curves.Curve(name=variant.name, points=points))
            if lines:
                words = f"{title} over {across}, a line for each variant; the table has the numbers."
                ident = f"{title}-{kind}".lower().replace(" ", "-")
                yield load_curves.curves(
                    lines, ident=ident, title=title, across=across, up=f"{title}, {up}", description=words
                )
