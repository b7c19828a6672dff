"""Loads and what clients saw under them: a table, curves, and how both are to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from optikit import text
from optikit.evaluation.latency_limits import Limits
from optikit.evaluation.results import LoadRow, Report
from optikit.report import load_curves

if TYPE_CHECKING:
    from markupsafe import Markup

HEADER = (
    "Variant",
    "Load",
    "Requests",
    "Errors",
    "TTFT, ms",
    "TPOT, ms",
    "E2E, ms",
    "mean",
    "p95",
    "Tokens/s",
    "Good",
    "$ per M out",
    "$ per M blended",
)
NONE = "–"
BLENDED = "blended is an estimate: three input tokens for each output token, nothing charged for reading them."
NOTES = (
    "TTFT: time to the first token, TPOT: time per token after it, E2E: to the last; medians with 95 % intervals.",
    "Times count from when a request was due, not from when a client got round to it.",
    "At a time: each client asks again when it is answered. Requests/s: at random times, whatever comes back.",
)


def words(row: LoadRow) -> str:
    """Say what was asked."""
    return f"{row.load:g} at a time" if row.kind == "clients" else f"{row.load:g} requests/s"


def rows(found: Sequence[LoadRow]) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for each load of each variant, as `HEADER` names it."""
    for row in found:
        yield (
            row.variant,
            words(row),
            str(row.requests),
            str(row.errors),
            _timed(row.ttft_ms_p50, row.ttft_ms_p50_ci95),
            _timed(row.tpot_ms_p50, row.tpot_ms_p50_ci95),
            _timed(row.e2e_ms_p50, None),
            _timed(row.e2e_ms_mean, None),
            _timed(row.e2e_ms_p95, None),
            text.number(row.output_tokens_per_s),
            NONE if row.good_share is None else text.percent(row.good_share),
            NONE if row.usd_per_million_output_tokens is None else text.dollars(row.usd_per_million_output_tokens),
            NONE if row.usd_per_million_blended_tokens is None else text.dollars(row.usd_per_million_blended_tokens),
        )


def _timed(value: float | None, ci95: tuple[float, float] | None) -> str:
    if value is None:
        return NONE
    spread = f" ({text.number(ci95[0])}–{text.number(ci95[1])})" if ci95 is not None else ""
    return text.number(value) + spread


def good(limits: Limits) -> str:
    """Say what a good request keeps; "" where there are no limits."""
    pairs = ((limits.ttft_ms, "TTFT"), (limits.tpot_ms, "TPOT"), (limits.e2e_ms, "end to end"))
    kept = [f"{name} ≤ {text.milliseconds(most)}" for most, name in pairs if most is not None]
    return f"Good: {', '.join(kept)}." if kept else ""


def conditions(report: Report) -> tuple[str, ...]:
    """Say how the result was loaded; nothing where it wasn't."""
    found = report.loaded
    if found is None:
        return ()
    said = [
        f"Served by {found.server} on this machine, which its clients share; {found.prompts} prompts in turn.",
        *NOTES,
        good(found.limits),
        "" if found.end_of_text_ignored else "Texts ended where the model ended them.",
        f"Peak memory of the server: {text.memory(found.peak_memory_mib)}.",
    ]
    return tuple(text.clean(line) for line in said if line)


def pictures(found: Sequence[LoadRow]) -> Iterator[Markup]:
    """Yield curves over the load, of what was measured at two loads at least."""
    drawn: tuple[
        tuple[str, str, Callable[[LoadRow], float | None], Callable[[LoadRow], tuple[float, float] | None]], ...
    ] = (
        ("Throughput", "output tokens per second", lambda row: row.output_tokens_per_s, lambda _: None),
        ("Time to first token", "ms", lambda row: row.ttft_ms_p50, lambda row: row.ttft_ms_p50_ci95),
        ("Time per output token", "ms", lambda row: row.tpot_ms_p50, lambda row: row.tpot_ms_p50_ci95),
        ("Price", "$ per million output tokens", lambda row: row.usd_per_million_output_tokens, lambda _: None),
    )
    for kind, across in (("clients", "clients at a time"), ("rate", "requests per second")):
        for title, up, value, ci95 in drawn:
            lines = []
            for name in dict.fromkeys(row.variant for row in found):
                own = sorted((r for r in found if r.variant == name and r.kind == kind), key=lambda r: r.load)
                points = tuple((row.load, seen, ci95(row)) for row in own if (seen := value(row)) is not None)
                if len(points) > 1:
                    lines.append(load_curves.Curve(name=name, points=points))
            if lines:
                words = f"{title} over {across}, a line for each variant; the table has the numbers."
                ident = f"{title}-{kind}".lower().replace(" ", "-")
                yield load_curves.curves(
                    lines, ident=ident, title=title, across=across, up=f"{title}, {up}", description=words
                )
