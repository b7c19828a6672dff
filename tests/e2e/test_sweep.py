"""`optikit sweep` as a user meets it: real runs of a tiny model, one after another, killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import Cli, Recipe
from tests.process.children import wait_for


@pytest.fixture
def recipe(tmp_path: Path, base_recipe: Recipe) -> Path:
    """A recipe without compilation and timing: seconds a variant, and named by a relative path."""
    (tmp_path / "model").symlink_to(base_recipe["model"])
    (tmp_path / "prose.txt").symlink_to(base_recipe["calibration"]["text"])
    written = {
        "model": "model",
        "stages": [{"quantize": {"method": "rtn", "bits": 4, "group_size": 32}}],
        "evaluate": {"perplexity": {"text": "prose.txt", "part": [0.7, 1.0], "window": 32, "windows": 16}},
        "sweep": {"vary": {"stages[0].quantize.bits": [4, 8], "stages[0].quantize.group_size": [32, 48]}},
    }
    (tmp_path / "sub").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    return path


def found(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    return loaded


def made(result: dict[str, Any]) -> Counter[str]:
    """Return how often each step was made, by key."""
    steps = [step for variant in result["variants"] for step in variant["steps"]]
    return Counter(step["key"] for step in steps if step["status"] == "executed")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_report_says_what_nothing_dominates(cli: Cli, recipe: Path) -> None:
    out = cli.cwd / "swept"
    process = cli.start("sweep", recipe, "--out", out, "--progress", "plain")
    first = out / "variants" / "bits-4_group-size-32" / "out" / "report.json"
    assert wait_for(lambda: first.is_file() or process.poll() is not None, 120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)
    stamp = first.stat().st_mtime_ns

    done = cli("sweep", recipe, "--out", out, "--progress", "plain")
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(out) not in line)
    result = found(out)
    status = {each["name"]: each["status"] for each in result["variants"]}
    assert status == {
        "bits-4_group-size-32": "done",
        "bits-4_group-size-48": "refused",
        "bits-8_group-size-32": "done",
        "bits-8_group-size-48": "refused",
    }
    refused = next(each for each in result["variants"] if each["status"] == "refused")
    assert "recipe.yaml:" in refused["reason"]
    assert "48" in refused["reason"]
    assert first.stat().st_mtime_ns == stamp, "what was done wasn't done again"
    assert max(made(result).values()) == 1
    assert "bits-4_group-size-32" in result["front"], "nothing is smaller"
    page = (out / "sweep.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "bits-4_group-size-32" in page

    again = cli("sweep", recipe, "--out", out, "--progress", "none", "--json")
    assert again.returncode == 0
    assert [each["attempts"] for each in json.loads(again.stdout)["variants"]] == [
        each["attempts"] for each in result["variants"]
    ]


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_it_with_a_report(cli: Cli, recipe: Path, number: signal.Signals, code: int) -> None:
    out = cli.cwd / "swept"
    process = cli.start("sweep", recipe, "--out", out, "--progress", "plain")
    assert wait_for(lambda: list(out.glob("variants/*/run.log")) or process.poll() is not None, 120)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    statuses = {each["status"] for each in found(out)["variants"]}
    assert statuses <= {"stopped", "refused", "done"}
    assert "stopped" in statuses
    assert (out / "sweep.html").is_file()


def test_a_spent_budget_ends_it_with_124(cli: Cli, recipe: Path) -> None:
    out = cli.cwd / "swept"
    done = cli("sweep", recipe, "--out", out, "--budget", "1s", "--progress", "plain")
    assert done.returncode == 124, done.stderr
    assert "budget of 1s is spent" in done.stdout
    assert {each["status"] for each in found(out)["variants"]} <= {"stopped", "refused", "done"}


def test_what_can_be_known_before_is_refused_before(cli: Cli, recipe: Path) -> None:
    none = cli("sweep", recipe, "--out", "swept", "--vary", "stages[0].quantize.group_size=48,80")
    assert (none.returncode, "none of 4 variants can work" in none.stderr) == (65, True), none.stderr
    assert not list(cli.cwd.glob("swept/variants/*/run.log"))
    assert cli("sweep", recipe, "--out", "priced", "--budget", "$5").returncode == 2
    assert cli("sweep", recipe, "--out", "odd", "--budget", "soon").returncode == 2
    assert cli("sweep", recipe, "--out", cli.cwd).returncode == 73
    assert cli("run", recipe, "--out", "one").returncode == 65
    assert os.listdir(cli.cwd / "sub") == []  # noqa: PTH208


@pytest.mark.slow
def test_halving_runs_the_better_third_in_full(cli: Cli, recipe: Path) -> None:
    out = cli.cwd / "swept"
    vary = ["--vary", "stages[0].quantize.group_size=32,64", "--vary", "seed=1,2,3"]
    done = cli("sweep", recipe, "--out", out, "--search", "halving", *vary, "--progress", "plain")
    assert done.returncode == 0, done.stderr
    variants = found(out)["variants"]
    status = Counter(each["status"] for each in variants)
    assert status == {"done": 4, "dropped": 8}
    for each in variants:
        full = out / "variants" / each["name"] / "out" / "report.json"
        assert full.exists() == (each["status"] == "done")
