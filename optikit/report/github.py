"""What a run says inside GitHub Actions: annotations on the run's page and a job summary.

Commands are lines of text, so a model name with a line break could forge one: every value is cleaned, then escaped as
the toolkit does (`%`, CR and LF; in properties `:` and `,` too).
Source: github.com/actions/toolkit, packages/core/src/command.ts; limits: docs.github.com, "Workflow commands".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from optikit import text
from optikit.evaluation.results import GateResult, Report
from optikit.progress import below, say
from optikit.report import gates, markdown
from optikit.report.headline import headline

Level = Literal["error", "warning", "notice"]

MOST = 10
"""Annotations of one level that a step may show; GitHub drops the rest without a word."""
SUMMARY_BYTES = 1024 * 1024
"""A larger job summary is refused whole."""
_CUT = "\n\n*Cut short: a job summary holds 1 MiB. The whole report is in report.md.*\n"


def publish(report: Report, environ: Mapping[str, str] = os.environ) -> None:
    """Print annotations (to stderr, which the runner reads as well) and append the job summary, when run by Actions."""
    if environ.get("GITHUB_ACTIONS") != "true":
        return
    for line in commands(report):
        say(below(sys.stderr), line)
    if summary := environ.get("GITHUB_STEP_SUMMARY"):
        append_summary(markdown.render(report), Path(summary))


def commands(report: Report) -> tuple[str, ...]:
    """Return the annotations: failed gates as errors, inconclusive ones and warnings as warnings, else the headline."""
    failed = [("optikit gate failed", _described(gate)) for gate in report.gates if gate.verdict == "fail"]
    doubtful = [
        ("optikit gate inconclusive", _described(gate)) for gate in report.gates if gate.verdict == "inconclusive"
    ]
    warned = [("optikit", warning) for warning in report.warnings]
    lines = [*_some("error", failed), *_some("warning", [*doubtful, *warned])]
    if not failed and not doubtful:
        level: Level = "warning" if gates.is_lax(report) else "notice"
        lines.append(command(level, "optikit", f"{headline(report)}. {gates.sentence(report)}"))
    return tuple(lines)


def command(level: Level, title: str, message: str) -> str:
    r"""Return one workflow command.

    >>> command("error", "a,b", "50 % of 2\n::error::x")
    '::error title=a%2Cb::50 %25 of 2 ::error::x'
    """
    title = _data(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={title}::{_data(message)}"


def append_summary(summary: str, path: Path) -> None:
    """Append Markdown to the job's summary file, cut at a line so that the file stays within GitHub's limit."""
    room = SUMMARY_BYTES - (path.stat().st_size if path.exists() else 0)
    content = summary.encode()
    if len(content) > room:
        kept = content[: max(0, room - len(_CUT.encode()))]
        content = kept[: kept.rfind(b"\n") + 1] + _CUT.encode()
    if len(content) <= room:
        with path.open("ab") as file:
            file.write(content)


def _data(value: str) -> str:
    return text.redact(text.clean(value)).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _described(gate: GateResult) -> str:
    interval = gates.interval(gate)
    reach = f" (95 % interval {interval})" if interval else ""
    reason = f": {gate.reason}" if gate.reason else ""
    return f"{gates.name(gate)} is {gates.value(gate)}{reach}, limit {gate.limit}{reason}"


def _some(level: Level, found: list[tuple[str, str]]) -> list[str]:
    """Return at most as many commands as GitHub shows; the last one says how many are left out."""
    if len(found) <= MOST:
        return [command(level, title, message) for title, message in found]
    shown = [command(level, title, message) for title, message in found[: MOST - 1]]
    return [*shown, command(level, "optikit", f"and {len(found) - MOST + 1} more: see the report")]
