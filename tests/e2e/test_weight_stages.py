"""Weight stages from the command line: several processes for one step, and a recovery between two others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Cli


@pytest.mark.slow
def test_two_processes_share_a_calibration(cli: Cli, base_recipe: dict[str, Any], write_recipe: Callable[..., Path]):
    """The step runs under torchrun; what it wrote is as good as what one process writes."""
    stages, perplexity = base_recipe["stages"][:1], base_recipe["evaluate"]["perplexity"]
    recipe = write_recipe({**base_recipe, "stages": stages, "evaluate": {"perplexity": perplexity}})
    process = cli("run", recipe, "--out", cli.cwd / "out", "--ranks", "2")
    assert process.returncode == 0, process.stderr
    report = json.loads((cli.cwd / "out" / "report.json").read_text())
    assert report["result"]["quality"]["perplexity"]["ratio"] < 1.2
    assert cli.temporary() == []


@pytest.mark.slow
def test_depth_distill_and_awq_stack(cli: Cli, base_recipe: dict[str, Any], write_recipe: Callable[..., Path]):
    """The teacher is the model before any stage; every step is measured, so that the report has the curve."""
    stages = [
        {"prune": {"method": "depth", "ratio": 0.5, "keep_last": 0}},
        {"finetune": {"method": "distill", "tokens": 512, "batch": 2, "learning_rate": 1e-3}},
        {"quantize": {"method": "awq", "group_size": 32, "steps": 2}},
    ]
    perplexity = base_recipe["evaluate"]["perplexity"]
    recipe = write_recipe({**base_recipe, "stages": stages, "evaluate": {"perplexity": perplexity}})
    process = cli("run", recipe, "--out", cli.cwd / "out")
    assert process.returncode == 0, process.stderr
    report = json.loads((cli.cwd / "out" / "report.json").read_text())
    assert [step["method"] for step in report["steps"]] == ["depth", "distill", "awq"]
    facts = report["steps"][1]["facts"]
    assert facts["held_out_loss_after"] < facts["held_out_loss_before"]
    assert all(step["measurement"]["quality"]["perplexity"]["ratio"] for step in report["steps"])
