"""A report on the terminal, on stderr: verdict, gates, before and after, and where the files are."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from optikit import text
from optikit.evaluation.results import Report
from optikit.progress import below, is_terminal, say
from optikit.report import figures, gates, wording
from optikit.report.headline import headline

WIDTH = 80
Styled = tuple[str, str]
"""Words and their style: "" or one of rich's, e.g. `bold green`."""

_VERDICT: Mapping[gates.Mark, Styled] = {
    "pass": ("✓", "bold green"),
    "lax": ("!", "bold yellow"),
    "fail": ("✗", "bold red"),
    "inconclusive": ("?", "bold yellow"),
    "emitted": ("→", "bold cyan"),
}
_TONE = {"better": "green", "worse": "yellow", "same": "dim", "": ""}


def show(report: Report, out: Path) -> None:
    """Print what a run achieved to stderr: verdict, gates, before and after, files. Coloured on a terminal."""
    terminal = is_terminal(sys.stderr)
    width = min(100, shutil.get_terminal_size((WIDTH, 24)).columns) if terminal else WIDTH
    lines = tuple(_lines(report, out, width))
    if not terminal:
        for line in lines:
            say(sys.stderr, "".join(words for words, _ in line).rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=below(sys.stderr))
    for line in lines:
        console.print(Text.assemble(*line), no_wrap=True, overflow="ellipsis", crop=True)


def _lines(report: Report, out: Path, width: int) -> Iterator[list[Styled]]:
    mark, style = _VERDICT[gates.mark(report)]
    lead = f"{mark} {gates.verdict(report)}"
    said = textwrap.wrap(headline(report), width - len(lead) - 2, break_on_hyphens=False) or [""]
    yield [("", "")]
    yield [(lead, style), (f"  {said[0]}", "bold")]
    yield from ([(f"{'':{len(lead)}}  {line}", "bold")] for line in said[1:])
    for line in textwrap.wrap(gates.sentence(report), width - len(lead) - 2):
        yield [(f"{'':{len(lead)}}  {line}", "")]
    yield from _gates(report)
    yield from _figures(report)
    yield [("", "")]
    missing = [f"not measured: {reason}" for reason in wording.reasons(report)]
    for remark in (*missing, *(text.clean(warning) for warning in report.warnings)):
        wrapped = textwrap.wrap(remark, width - 2)
        yield from ([("! " if i == 0 else "  ", "yellow"), (line, "")] for i, line in enumerate(wrapped))
    if report.warnings or missing:
        yield [("", "")]
    yield from _files(out)


def _files(out: Path) -> Iterator[list[Styled]]:
    """Yield where everything is, and what to do with it."""
    yield from ([(text.clean(str(path)), "")] for path in written(out))
    steps = tuple(following(out))
    if steps:
        yield [("", "")]
        yield from ([("next  " if i == 0 else "      ", "dim"), (text.clean(step), "")] for i, step in enumerate(steps))


def following(out: Path) -> Iterator[str]:
    """Yield the commands that serve, compare and publish what was made; none where there is nothing to serve.

    What was emitted is finished on its device before it is served or compared.
    """
    if not (out / "artifact.json").is_file() or not any((out / name).is_dir() for name in ("model", "compiled")):
        return
    place = shlex.quote(str(out))
    unfinished = [run for run in sorted(out.glob("compiled/*/run.sh")) if not (run.parent / "result.json").is_file()]
    yield from (
        f"sh {shlex.quote(str(run))}  # on the device; then this command again, with --resume" for run in unfinished
    )
    if not unfinished:
        yield f"optikit serve {place}"
        yield f"optikit bench {place} URL --prompts FILE.jsonl --out bench/"
    yield f"optikit publish {place} hf:ORG/NAME --dry-run"


def _gates(report: Report) -> Iterator[list[Styled]]:
    if not report.gates:
        return
    yield [("", "")]
    yield _cells(("gate", "limit", "measured", "95 % interval"), (22, 11, 12, 17), "<>>>", "dim")
    for gate in report.gates:
        values = (gates.name(gate), text.clean(gate.limit), gates.value(gate), gates.interval(gate))
        line = _cells(values, (22, 11, 12, 17), "<>>>")
        yield [*line, (f"   {gate.verdict}", _VERDICT[gate.verdict][1])]


def _figures(report: Report) -> Iterator[list[Styled]]:
    widths, sides = (25, 11, 11, 15, 13), "<>>>>"
    yield [("", "")]
    yield _cells(("", "baseline", "result", "change", "95 % interval"), widths, sides, "dim")
    for group in figures.groups(report):
        for figure in group.figures:
            label = figure.label.removesuffix(", median")
            values = (label, figure.baseline, figure.result, figure.change, figure.interval.replace(" ", ""))
            line = _cells(values, widths, sides)
            yield [*line[:3], (line[3][0], _TONE[figure.tone]), line[4]]


def _cells(values: Sequence[str], widths: Sequence[int], sides: str, style: str = "") -> list[Styled]:
    """Return one line of a table: every value cut to its column, aligned left (<) or right (>)."""
    cut = (
        value if len(value) <= width else f"{value[: width - 1]}…" for value, width in zip(values, widths, strict=True)
    )
    padded = (f"{value:{side}{width}}" for value, width, side in zip(cut, widths, sides, strict=True))
    return [(cell if i == 0 else f" {cell}", style) for i, cell in enumerate(padded)]


def written(out: Path) -> tuple[Path, ...]:
    """Return what a user opens of an output directory, of that which is there."""
    fixed = [out / name for name in ("report.html", "report.md", "report.json", "model", "speculator")]
    found = [path for path in fixed if path.exists()]
    for parent in ("compiled", "serve"):
        found += sorted(path for path in (out / parent).glob("*") if path.is_dir())
    return tuple(found)
