"""Every weight technique in one table: quality, size, decode speed, time and memory, out of the reports of its recipe.

    python tests/benchmarks/weights_table.py      reads examples/NAME/report.json, as record.py recorded it

Nothing is measured here: every number is that of a report, and what a report doesn't have is a dash. A recipe without
a compile stage has quality and size, but no speed: nothing here serves its format faster than the original.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from optikit.evaluation.results import Report, StepReport
from optikit.report.write import JSON, load

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m"
NAMES = (
    *("gptq", "awq", "int8-w8a16", "int8-w8a8", "int8-llm"),
    *("magnitude", "wanda", "sparsegpt", "sparsegpt-gptq"),
    *("width", "depth", "depth-distill-awq"),
)
WEIGHT_VERBS = ("prune", "finetune", "quantize")
DASH = "–"
COLUMNS = ("recipe", "perplexity ratio", "before the last step", "size", "decode", "time", "peak memory")


def cells(name: str, report: Report) -> tuple[str, ...]:
    """Return the row of a report."""
    weights = [step for step in report.steps if step.verb in WEIGHT_VERBS]
    return (
        name.removeprefix(f"{MODEL}-").removesuffix("-cpu"),
        ratio(report),
        curve(weights),
        size(report),
        decode(report),
        f"{sum(step.seconds for step in weights):.0f} s",
        f"{max(step.peak_memory_mib for step in weights):.0f} MiB",
    )


def ratio(report: Report) -> str:
    """Return the perplexity of the result over the baseline's, with its interval."""
    found = report.result.quality.perplexity if report.result.quality else None
    if found is None or found.ratio is None:
        return DASH
    low, high = found.ratio_ci95 or (found.ratio, found.ratio)
    return f"{found.ratio:.3f} ({low:.3f}–{high:.3f})"


def curve(steps: list[StepReport]) -> str:
    """Return the perplexity ratios after each weight step but the last: what recovering recovered."""
    found = []
    for step in steps[:-1]:
        quality = step.measurement.quality if step.measurement else None
        if quality and quality.perplexity and quality.perplexity.ratio is not None:
            found.append(f"{step.method} {quality.perplexity.ratio:.3f}")
    return ", ".join(found) or DASH


def size(report: Report) -> str:
    """Return the size of the result's weights, and over the baseline's."""
    before, after = report.baseline.size_bytes, report.result.size_bytes
    return f"{after / 2**20:.0f} MiB ({after / before:.2f}×)" if before and after else DASH


def decode(report: Report) -> str:
    """Return decode speed, and over the baseline's with its interval."""
    speed, gain = report.result.speed, report.speedup.decode
    if speed is None:
        return DASH
    faster = f" ({gain.value:.2f}×, {gain.ci95[0]:.2f}–{gain.ci95[1]:.2f})" if gain else ""
    return f"{speed.decode_tokens_per_s:.0f} tok/s{faster}"


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "examples", help="directory of one directory per recipe")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    wanted = parser.parse_args()
    rows, hosts, missing = [], set(), []
    for name in (f"{MODEL}-{short}-cpu" for short in wanted.only):
        if not (wanted.out / name / JSON).is_file():
            missing.append(name)
            continue
        report = load(wanted.out / name)
        rows.append(cells(name, report))
        hosts.add(f"{report.host.get('cpu')}, {report.created[:10]}")
    print(" · ".join(sorted(hosts)) + "\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("| :-- |" + " --: |" * (len(COLUMNS) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if missing:
        print(f"\nNot recorded: {', '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    main()
