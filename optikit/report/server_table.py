"""What clients of a server saw, in words."""

from __future__ import annotations

from optikit import text
from optikit.evaluation.results import Report

HEADER = (
    "At a time",
    "Requests",
    "TTFT, median",
    "95 % interval",
    "TPOT, median",
    "End to end, median",
    "End to end, p95",
    "Tokens per second",
    "$ per M out",
    "$ per M blended",
)


def rows(report: Report) -> tuple[tuple[str, ...], ...]:
    """Return what clients of a server saw, a row for each number of requests at a time, as `HEADER` names it."""
    return tuple(
        (
            str(row.concurrency),
            f"{row.requests:,}",
            text.milliseconds(row.ttft_ms_p50),
            f"{text.milliseconds(row.ttft_ms_p50_ci95[0])} – {text.milliseconds(row.ttft_ms_p50_ci95[1])}",
            text.milliseconds(row.tpot_ms_p50),
            text.milliseconds(row.e2e_ms_p50),
            text.milliseconds(row.e2e_ms_p95) if row.e2e_ms_p95 is not None else "–",
            text.number(row.output_tokens_per_s),
            _dollars(row.usd_per_million_output_tokens),
            _dollars(row.usd_per_million_blended_tokens),
        )
        for row in (report.served.speed if report.served else ())
    )


def _dollars(value: float | None) -> str:
    return "–" if value is None else text.dollars(value)


def conditions(report: Report) -> tuple[str, ...]:
    """Say how a server was measured."""
    served = report.served
    if served is None or not served.speed:
        return ()
    lengths = f"{text.number(served.speed[0].output_tokens_p50)} tokens written per request, median"
    prompted = served.speed[0].prompt_tokens_p50
    prompts = f", prompts of {text.number(prompted)} tokens" if prompted is not None else ""
    ended = "the end of a text was ignored" if served.end_of_text_ignored else "texts ended where the model ended them"
    return (
        text.clean(f"Model {served.model} at {served.url}: {lengths}{prompts}; {ended}."),
        f"Tokens counted by {served.tokens_counted_by}. Times include the network between here and there.",
        "Each client sends its next prompt when its last is answered; 95th percentiles need 90 requests.",
    )
