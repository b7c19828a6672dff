"""The table of estimates against recorded runs: its arithmetic; the recorded page is what the command writes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from tests.report.conftest import full

path = Path(__file__).parent / "benchmarks" / "estimates.py"
spec = importlib.util.spec_from_file_location("estimates", path)
estimates = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = estimates  # dataclasses look their module up
spec.loader.exec_module(estimates)


def test_every_step_has_its_ratios():
    report = full()
    steps = [report.steps[0].model_copy(update={"estimate_disk_bytes": 250_000_000}), *report.steps[1:]]
    steps[2] = steps[2].model_copy(update={"status": "emitted"})
    found = list(estimates.rows("x", report.model_copy(update={"steps": tuple(steps)})))
    assert [row.step for row in found] == ["prune sparsegpt", "quantize gptq"] + [
        f"measure {name}" for name in ("quality baseline", "quality result", "speed")
    ]
    first = found[0]
    assert first.ratio("size") == steps[0].artifact_bytes / 250_000_000
    assert abs(first.ratio("time") - 1 / 0.9) < 1e-9
    assert abs(first.ratio("memory") - 1 / 1.1) < 1e-9
    assert all(row.ratio("size") is None for row in found[1:])
    said = list(estimates.summary(found))
    assert said[0].startswith("time: 5 of 5 steps within 30%")
    assert said[2].startswith("size: 0 of 1 steps within 2%")


def test_the_recorded_page_is_what_the_command_writes():
    root = path.parents[2]
    places = sorted(report.parent for report in (root / "examples").glob("*/report.json"))
    found = [row for place in places for row in estimates.rows(place.name, estimates.write.load(place))]
    assert (root / "examples" / "estimates.md").read_text(encoding="utf-8") == estimates.page(found)
