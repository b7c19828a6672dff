"""What a run says in CI when a gate fails: annotations, job summary and JUnit of the recorded quickstart.

    python tests/benchmarks/ci_example.py      # writes examples/ci/annotations.txt, summary.md, junit.xml

The recorded run is judged once more, by gates that it can't keep; every measurement is as recorded.
"""

from __future__ import annotations

import sys
from pathlib import Path

from optikit.evaluation.results import Report
from optikit.recipe.schema import Gate
from optikit.report import github, judge, junit, markdown, write

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "examples" / "ci"
GATES = {"perplexity_ratio": Gate(max=1.005), "decode_speedup": Gate(min=2.0), "size_ratio": Gate(max=0.5)}
"""As `--set gates.perplexity_ratio.max=1.005` would have it."""


def judged() -> Report:
    """Return the recorded quickstart under stricter gates."""
    report = write.load(ROOT / "examples" / "quickstart")
    quality, decode = report.result.quality, report.speedup.decode
    values = {
        "perplexity_ratio": judge.Value(value=quality.perplexity.ratio, ci95=quality.perplexity.ratio_ci95)
        if quality and quality.perplexity
        else judge.Value(),
        "decode_speedup": judge.Value(value=decode.value, ci95=decode.ci95) if decode else judge.Value(),
        "size_ratio": judge.Value(value=(report.result.size_bytes or 0) / (report.baseline.size_bytes or 1)),
    }
    results = judge.judge(GATES, values)
    limits = {name: gate.model_dump(mode="json") for name, gate in GATES.items()}
    changed = {"gates": results, "verdict": judge.overall(results), "recipe": report.recipe | {"gates": limits}}
    return report.model_copy(update=changed)


def files() -> dict[str, str]:
    """Return every file by its name."""
    report = judged()
    return {
        "annotations.txt": "".join(f"{line}\n" for line in github.commands(report)),
        "summary.md": markdown.render(report),
        "junit.xml": junit.render(report),
    }


def main() -> int:
    """Write the files."""
    for name, content in files().items():
        (PLACE / name).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
