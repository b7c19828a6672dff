"""What `optikit plan` expects against what runs measured: seconds, memory and size of every step, with ratios.

    python tests/benchmarks/estimates.py                  # every recorded report → examples/estimates.md
    python tests/benchmarks/estimates.py out/ other/out/   # other runs, printed only

The recipe of each report is planned again, so that what is judged are the estimates of today. A step counts once,
however many runs found it in their store: the newest measurement of what has the same key today. A run whose recipe
can't be planned here (a hub is asked for) is left out. Sizes are those of everything that a step wrote.
Measured steps are left out of the size column: what they keep is not shipped.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from optikit import text
from optikit.errors import OptikitError
from optikit.evaluation.results import Report, StepReport
from optikit.models.strict_json import read_object
from optikit.plan.make import make_plan
from optikit.plan.model import Step
from optikit.recipe.load import load
from optikit.report import markdown, wording, write
from optikit.store.store import Store

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "estimates.md"
RECORDED = ("*/report.json", "estimates/*/report.json")
"""Below examples/: runs that are examples themselves, and runs that were only made to see what steps take."""
RENAMED = {
    "judged": "eval_prompts",
    "judged_part": "eval_part",
    "remember": "datastore_answers",
    "most_tokens": "max_tokens",
}
"""Keys of recorded recipes → what recipes call them today."""
ADDED: Mapping[str, Mapping[str, Any]] = {"speed": {"precision": 0}, "onnxruntime": {"verify": "own"}}
"""Options that there are since, by section or engine, with the value that does what was done before."""
MIB = 2**20
CLOSE = {"time": 0.30, "memory": 0.15, "size": 0.02}
"""How far an actual figure may be from its estimate to count as close."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step: what was expected and what happened; the size is None where none was estimated."""

    run: str
    step: str
    key: str
    when: str
    time: tuple[float, float]
    memory: tuple[float, float]
    size: tuple[float, float] | None

    def ratio(self, what: str) -> float | None:
        """Return actual over estimated."""
        pair = getattr(self, what)
        return pair[1] / pair[0] if pair and pair[0] > 0 else None


def rows(name: str, report: Report, planned: Mapping[str, Step]) -> Iterator[Row]:
    """Yield the steps of a report, with the estimates and keys of the same steps as they are planned today, if any."""
    for step in (*report.steps, *report.measures):
        if step.status == "emitted":
            continue
        today = planned.get(step.name)
        if planned and today is None:
            continue
        yield Row(
            run=name,
            step=wording.step_label(step),
            key=today.key if today else step.key,
            when=str(report.created),
            time=(today.estimate.seconds if today else step.estimate_seconds, step.seconds),
            memory=(
                today.estimate.peak_bytes if today else step.estimate_peak_memory_mib * MIB,
                step.peak_memory_mib * MIB,
            ),
            size=_size(step, today),
        )


def replanned(place: Path) -> dict[str, Step]:
    """Return the steps of a recorded recipe by name as they are planned today; none where it can't be planned here."""
    recipe = read_object(place / "report.json")["recipe"]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "recipe.yaml"
        path.write_text(yaml.safe_dump(_said(recipe), sort_keys=False), encoding="utf-8")
        try:
            plan = make_plan(load(path), Store.default(), weights=False, digests=False)
        except OptikitError as error:
            print(f"left out: {place.name}: {error}", file=sys.stderr)
            return {}
    return {step.name: step for step in (*plan.steps, *plan.measures)}


def _said(value: Any) -> Any:
    """Return a recorded recipe in today's words, without what it left open."""
    if isinstance(value, Mapping):
        kept = {name: _said(each) for name, each in value.items() if each not in (None, "", [], {})}
        kept |= {name: {**ADDED[name], **each} for name, each in kept.items() if name in ADDED}
        kept = {**ADDED.get(kept.get("engine", ""), {}), **kept}
        return {RENAMED.get(name, name): each for name, each in kept.items()}
    return [_said(each) for each in value] if isinstance(value, list) else value


def newest(found: Iterable[Row]) -> list[Row]:
    """Return each step once, as it was measured last."""
    kept: dict[str, Row] = {}
    for row in found:
        if row.key not in kept or row.when > kept[row.key].when:
            kept[row.key] = row
    return sorted(kept.values(), key=lambda row: row.run)


def _size(step: StepReport, today: Step | None) -> tuple[float, float] | None:
    if step.verb == "measure" or step.estimate_disk_bytes is None:
        return None
    expected = step.estimate_disk_bytes if today is None else today.estimate.disk_bytes
    return float(expected), float(step.artifact_bytes)


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
        "Written by `python tests/benchmarks/estimates.py` from every recorded report: for each step what",
        "`optikit plan` expects of it today, what the newest run that made it took, and the ratio. A step that several",
        "runs share counts once. The constants in the estimates were fitted to most of these runs: the page says how",
        "well such laws can do, not how well they do elsewhere. Some runs had other work beside them, and some steps",
        "(acquire gguf, prune depth and magnitude, quantize int8 and nf4) take less memory since they were recorded.",
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
    recorded = (path.parent for pattern in RECORDED for path in (ROOT / "examples").glob(pattern))
    places = given.runs or sorted(recorded)
    plans = {place: replanned(place) for place in places}
    found = newest(row for place, steps in plans.items() if steps for row in rows(place.name, write.load(place), steps))
    if not found:
        print("no steps were found", file=sys.stderr)
        return 1
    if given.runs:
        print("\n".join([*table(found), "", *summary(found)]))
    else:
        PAGE.write_text(page(found), encoding="utf-8")
        print(f"{PAGE}: {len(found)} steps of {sum(map(bool, plans.values()))} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
