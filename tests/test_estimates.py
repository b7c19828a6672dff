"""The table of estimates against recorded runs: its arithmetic, and which measurement of a step counts."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
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
    found = list(estimates.rows("x", report.model_copy(update={"steps": tuple(steps)}), {}))
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


def test_what_several_runs_share_counts_once_as_measured_last():
    (first, *_) = estimates.rows("a", full(), {})
    later = replace(first, run="b", when="2999", time=(1.0, 2.0))
    assert estimates.newest([later, first]) == estimates.newest([first, later]) == [later]
    other = replace(first, key="another", run="0")
    assert estimates.newest([first, later, other]) == [other, later]


def test_a_recorded_recipe_is_said_in_words_of_today():
    recorded = {"stages": [{"speculate": {"method": "lookup", "judged": 24, "draft": ""}}], "gates": {}, "seed": 0}
    assert estimates._said(recorded) == {"stages": [{"speculate": {"method": "lookup", "eval_prompts": 24}}], "seed": 0}
