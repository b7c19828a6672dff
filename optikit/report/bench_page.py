"""bench.json, samples.jsonl, bench.md and bench.html: a load test for programs and for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from optikit import text
from optikit.evaluation.bench_results import Bench, Sample
from optikit.report import html, load_table, markdown
from optikit.report.values import listed
from optikit.report.write import put

SAME_HEADER = ("Variant", "Against", "Prompts", "Same first token", "Same answer", "Mean latency")


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
    most, load = text.number(best.output_tokens_per_s), load_table.words(best)
    found = f"{best.variant} writes up to {most} tokens per second, {load}"
    others = []
    for variant in bench.variants:
        if variant.name != best.variant:
            its = max(row.output_tokens_per_s for row in bench.rows if row.variant == variant.name)
            others.append(f"{text.ratio(best.output_tokens_per_s / max(its, 1e-9))} {variant.name}")
    return text.clean(found + (f": {', '.join(others)} at its best" if others else ""))


def _same(bench: Bench) -> Iterator[tuple[str, ...]]:
    for each in bench.identity:
        share = [
            text.percent(count / each.prompts) if each.prompts else load_table.NONE
            for count in (each.first_token, each.whole)
        ]
        against = each.against or bench.variants[0].name
        yield (each.variant, against, str(each.prompts), *share, _sooner(bench, each.variant, against))


def _sooner(bench: Bench, variant: str, against: str) -> str:
    """Say how much sooner answers of a variant end, on average under the first load, than those of another."""
    load = bench.rows[0].load, bench.rows[0].kind
    mean = {row.variant: row.e2e_ms_mean for row in bench.rows if (row.load, row.kind) == load}
    ours, theirs = mean.get(variant), mean.get(against)
    if not ours or not theirs:
        return load_table.NONE
    return text.change(theirs / ours, ("sooner", "later"))


def notes(bench: Bench) -> tuple[str, ...]:
    """Say how figures are to be read."""
    found = [*load_table.NOTES]
    if not bench.end_of_text_ignored:
        found.append("Texts ended where a model ended them: variants may have written different lengths.")
    if bench.usd_per_hour is None:
        found.append("No price: say what the machine costs with --usd-per-hour.")
    else:
        less = f", less {text.percent(bench.discount)}" if bench.discount else ""
        found.append(f"Price: ${bench.usd_per_hour:g} per hour{less}; {load_table.BLENDED}")
    good = load_table.good(bench.limits)
    found.append(good or "No limits: say with --ttft-ms and others what is good.")
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
    rows = [[markdown.escape(cell) for cell in row] for row in load_table.rows(bench.rows)]
    lines = [f"## {markdown.escape(headline(bench))}", "", *markdown.table(load_table.HEADER, rows, "l" + 12 * "r"), ""]
    same = [[markdown.escape(cell) for cell in row] for row in _same(bench)]
    if same:
        lines += [*markdown.table(SAME_HEADER, same, "llrrrr"), ""]
    lines += [f"- {markdown.escape(note)}" for note in notes(bench)]
    lines += [f"- {markdown.escape(name)}: {markdown.escape(value)}" for name, value in _about(bench)]
    return "\n".join([*lines, "", markdown.code(bench.command), ""])


def terminal(bench: Bench) -> str:
    """Return what a terminal shows: a table as wide as it has to be."""
    table = [load_table.HEADER, *load_table.rows(bench.rows)]
    shown = [[text.clean(cell) for cell in row] for row in table]
    wide = [max(len(row[i]) for row in shown) for i in range(len(load_table.HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip() for row in shown]
    return "\n".join([headline(bench), "", *lines])


def render_html(bench: Bench) -> str:
    """Return the page."""
    template = html.environment().get_template("bench.html.j2")
    return template.render(
        bench=bench,
        headline=headline(bench),
        pictures=tuple(load_table.pictures(bench.rows)),
        header=load_table.HEADER,
        rows=tuple(load_table.rows(bench.rows)),
        same_header=SAME_HEADER,
        same=tuple(_same(bench)),
        notes=notes(bench),
        about=_about(bench),
        text=text,
    )
