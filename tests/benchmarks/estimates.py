"""What `optikit plan` expected against what runs measured: seconds, memory and size of every step, with ratios.

    python tests/benchmarks/estimates.py                  # every examples/*/report.json → examples/estimates.md
    python tests/benchmarks/estimates.py out/ other/out/   # other runs, printed only

A step that was found in the store counts with the time it took when it was made. Sizes are those of everything that a
step wrote. Measured steps are left out of the size column: what they keep is not shipped.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optikit import text
from optikit.evaluation.results import Report, StepReport
from optikit.report import markdown, wording, write

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "estimates.md"
MIB = 2**20
CLOSE = {"time": 0.30, "memory": 0.15, "size": 0.02}
"""How far an actual figure may be from its estimate to count as close."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step: what was expected and what happened; the size is None where none was estimated."""

    run: str
    step: str
    time: tuple[float, float]
    memory: tuple[float, float]
    size: tuple[float, float] | None

    def ratio(self, what: str) -> float | None:
        """Return actual over estimated."""
        pair = getattr(self, what)
        return pair[1] / pair[0] if pair and pair[0] > 0 else None


def rows(name: str, report: Report) -> Iterator[Row]:
    """Yield the steps of a report."""
    for step in (*report.steps, *report.measures):
        if step.status == "emitted":
            continue
        yield Row(
            run=name,
            step=wording.step_label(step),
            time=(step.estimate_seconds, step.seconds),
            memory=(step.estimate_peak_memory_mib * MIB, step.peak_memory_mib * MIB),
            size=_size(step),
        )


def _size(step: StepReport) -> tuple[float, float] | None:
    if step.verb == "measure" or step.estimate_disk_bytes is None:
        return None
    return float(step.estimate_disk_bytes), float(step.artifact_bytes)


def summary(found: Sequence[Row]) -> Iterator[str]:
    """Yield, for each figure, how many steps came close and the typical ratio."""
    for what, limit in CLOSE.items():
        ratios = [ratio for row in found if (ratio := row.ratio(what)) is not None and ratio > 0]
        if ratios:
            close = sum(abs(ratio - 1) <= limit for ratio in ratios)
            typical = math.exp(sum(map(math.log, ratios)) / len(ratios))
            yield (
                f"{what}: {close} of {len(ratios)} steps within {limit:.0%} of the estimate; "
                f"actual / estimated {text.number(min(ratios), 2)} to {text.number(max(ratios), 2)}, "
                f"geometric mean {text.number(typical, 2)}"
            )


def table(found: Sequence[Row]) -> list[str]:
    """Return the table's lines, Markdown."""
    header = ("Run", "Step", "Time", "", "Peak memory", "", "Size", "")
    cells = (
        (
            markdown.escape(row.run),
            markdown.escape(row.step),
            *_cells(row, "time", text.duration),
            *_cells(row, "memory", text.size),
            *_cells(row, "size", text.size),
        )
        for row in found
    )
    return markdown.table(header, cells, "llrrrrrr")


def _cells(row: Row, what: str, write_: object) -> tuple[str, str]:
    pair = getattr(row, what)
    if pair is None or not callable(write_):
        return "–", ""
    ratio = row.ratio(what)
    return f"{write_(pair[0])} → {write_(pair[1])}", f"{ratio:.2f}×" if ratio is not None else ""


def page(found: Sequence[Row]) -> str:
    """Return the page."""
    lines = [
        "# Estimated and measured",
        "",
        "Written by `python tests/benchmarks/estimates.py` from every `examples/*/report.json`: for each step the",
        "estimate of `optikit plan`, what the recorded run took, and actual / estimated.",
        "",
        *(f"- {line[0].upper()}{line[1:]}." for line in summary(found)),
        "",
        *table(found),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of given runs, or write the page of all recorded ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="output directories; none takes the recorded examples")
    given = parser.parse_args(arguments)
    places = given.runs or sorted(path.parent for path in (ROOT / "examples").glob("*/report.json"))
    found = [row for place in places for row in rows(place.name, write.load(place))]
    if not found:
        print("no steps were found", file=sys.stderr)
        return 1
    if given.runs:
        print("\n".join([*table(found), "", *summary(found)]))
    else:
        PAGE.write_text(page(found), encoding="utf-8")
        print(f"{PAGE}: {len(found)} steps of {len(places)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
