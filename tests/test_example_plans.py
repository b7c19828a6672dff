"""The captures of plans are what the commands say today; broken recipes break by the rule they name, repairs plan."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

path = Path(__file__).parent / "benchmarks" / "plans.py"
spec = importlib.util.spec_from_file_location("plans", path)
plans = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plans)

SAME_EVERYWHERE = sorted(recipe for recipe in plans.PLANS.glob("*.yaml") if recipe.stem != "cpu")


def without_estimates(capture):
    """Leave out estimates of time, memory and disk: they are tuned more often than captures are made."""
    return re.sub(r" +", " ", re.sub(r"\b[\d.]+ (?:s|min|h|MiB|GiB)\b", "#", capture))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    with plans.workplace(tmp_path_factory.mktemp("plans")) as place:
        yield place


@pytest.mark.parametrize("recipe", SAME_EVERYWHERE, ids=lambda recipe: recipe.stem)
def test_a_recorded_plan_is_what_the_command_says(recipe, directory):
    recorded = recipe.with_suffix(".txt").read_text(encoding="utf-8")
    assert without_estimates(plans.capture_plan(recipe, directory)) == without_estimates(recorded)


def test_the_plan_for_this_machine_plans(directory):
    assert "measure-speed" in plans.capture_plan(plans.PLANS / "cpu.yaml", directory)


@pytest.mark.parametrize("recipe", plans.broken(), ids=lambda recipe: recipe.stem)
def test_a_broken_recipe_is_refused_by_its_rule_and_repaired(recipe, directory):
    told, repaired = plans.capture_broken(recipe, directory)
    assert told == recipe.with_suffix(".txt").read_text(encoding="utf-8")
    assert repaired == recipe.with_suffix(plans.FIXED).read_text(encoding="utf-8")
    (code,) = re.findall(r"^# Broken: (\S+)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    assert f"[{code}]" in told
    assert "    = fix: " in told


def test_the_repaired_recipes_plan(directory):
    for fixed in sorted(plans.BROKEN.glob(f"*{plans.FIXED}")):
        shutil.copy(fixed, directory / fixed.name)
        code, printed = plans.command("plan", fixed.name)
        assert code == 0, printed


def test_the_70_b_model_is_planned_from_headers_in_a_file_without_contents(directory):
    weights = directory / "llama-2-70b" / "model.safetensors"
    assert weights.stat().st_size > 130e9
    assert weights.stat().st_blocks * 512 < 2**20
