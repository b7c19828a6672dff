"""What this machine's memory can't hold is told by a plan and refused by a run, before anything is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from optikit import host
from optikit.app import run
from optikit.errors import RecipeError
from optikit.plan import Plan, make_plan, room
from optikit.plan.render import render
from optikit.recipe.load import load
from optikit.stage import Estimate
from optikit.store.store import Store

MIB = 2**20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which only small steps can be done."""
    monkeypatch.setattr(host, "memory_bytes", lambda: host.KEPT_BYTES + 300 * MIB)
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, prose: Path) -> Path:
    written = {
        "model": str(tiny_llama),
        "calibration": {"text": str(prose), "samples": 4, "length": 32},
        "stages": [{"quantize": {"method": "gptq", "group_size": 32}}],
        "evaluate": {"perplexity": {"text": str(prose), "window": 32, "windows": 4}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    return path


def planned(recipe: Path, **how: Any) -> tuple[Plan, Store]:
    store = Store.default()
    return make_plan(load(recipe), store, **how), store


def test_a_plan_tells_every_step_with_its_place_and_a_fix(recipe: Path) -> None:
    plan, store = planned(recipe)
    found = {warning.message.split()[0]: warning for warning in plan.warnings if warning.code == "memory-machine"}
    assert found.keys() == {step.name for step in (*plan.steps, *plan.measures)}
    quantize = found["1-quantize-gptq"]
    assert quantize.mark is not None
    assert "quantize" in quantize.mark.text
    measure = found["measure-quality-baseline"].mark
    assert measure is not None
    assert recipe.read_text().splitlines().index("  perplexity:") in (measure.line - 1, measure.line - 2)
    assert f"{recipe}:{quantize.mark.line}" in render(plan, store)
    assert f"fix: {quantize.fix}" in render(plan, store)


def test_a_run_is_refused_before_any_work(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "execute", lambda *_: pytest.fail("a step was started"))
    request = run.Request(recipe=recipe, out=tmp_path / "out", progress="none", device="cpu")
    with pytest.raises(RecipeError) as refused:
        run.run_recipe(request)
    assert refused.value.code == 65
    assert {problem.code for problem in refused.value.problems} == {"memory-machine"}
    assert all(problem.level == "error" and problem.mark and problem.fix for problem in refused.value.problems)
    assert not (tmp_path / "out").exists()


def test_what_is_made_already_or_fits_or_comes_later_is_not_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = planned(recipe)
    with pytest.raises(RecipeError, match="one step"):
        room.require(plan, plan.steps, store)
    with monkeypatch.context() as full:
        full.setattr(store, "find", lambda _: object())
        room.require(plan, plan.order, store)
    room.require(plan, (), store)
    small_step = replace(plan.steps[0], estimate=Estimate(seconds=1, peak_bytes=100 * MIB, disk_bytes=1))
    room.require(plan, [small_step], store, ranks=3)
    with pytest.raises(RecipeError, match="one step"):
        room.require(plan, [small_step], store, ranks=4)


def test_on_a_gpu_it_stays_a_warning(recipe: Path) -> None:
    plan, store = planned(recipe, device="cuda")
    assert "memory-machine" in {warning.code for warning in plan.warnings}
    room.require(plan, plan.order, store)


@pytest.mark.parametrize(("limit", "code"), [("200MiB", "memory-bound"), ("64GiB", "memory-machine")])
def test_a_recipes_own_limit_is_told_as_that(recipe: Path, limit: str, code: str) -> None:
    recipe.write_text(recipe.read_text() + f"max_memory: {limit}\n")
    if code == "memory-machine":
        assert {warning.code for warning in planned(recipe)[0].warnings} == {code}
        return
    with pytest.raises(RecipeError) as refused:
        planned(recipe)
    assert {problem.code for problem in refused.value.problems} == {code}


@pytest.mark.parametrize(
    ("estimate", "room_bytes", "peak"),
    [
        (Estimate(seconds=1, peak_bytes=900, disk_bytes=0), 1000, 900),
        (Estimate(seconds=1, peak_bytes=900, disk_bytes=0), 500, 900),
        (Estimate(seconds=1, peak_bytes=900, disk_bytes=0, spare_bytes=600), 500, 500),
        (Estimate(seconds=1, peak_bytes=900, disk_bytes=0, spare_bytes=600), 200, 300),
    ],
)
def test_what_can_be_spared_is(estimate: Estimate, room_bytes: int, peak: int) -> None:
    assert estimate.within(room_bytes).peak_bytes == peak


def test_what_can_be_streamed_is_where_it_has_to_be() -> None:
    streamed = Estimate(seconds=9, peak_bytes=300, disk_bytes=0, scratch_bytes=50)
    whole = Estimate(seconds=1, peak_bytes=900, disk_bytes=0, streamed=streamed)
    assert whole.within(900) is whole
    assert whole.within(500) is streamed
    assert whole.within(100).peak_bytes == 300
