"""The loop over a plan's steps, with real workers and a real store."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit.errors import IntegrityError, LockedError, OptikitError
from optikit.execution.execute import Settings, execute
from optikit.plan import Plan, make_plan
from optikit.progress import Progress
from optikit.recipe.load import loads
from optikit.store.store import Store

RECIPE = """
model: {model}
target: {target}
stages: [{stages}]
"""
RTN = "quantize: {method: rtn, group_size: 32}"
SERVED = "compile: {engine: tensorrt-llm, sequence_length: 256, max_num_tokens: 256}"
PRUNED = "prune: {method: magnitude}"


class Told(Progress):
    """Progress that remembers how each step ended."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.ended: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def finish(self, name: str, status: str, *_: object) -> None:
        self.ended.append((name, status))

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def planned(tmp_path: Path, tiny_llama: Path, store: Store) -> Callable[..., Plan]:
    def plan(*stages: str, target: str = "cpu") -> Plan:
        text = RECIPE.format(model=tiny_llama, target=target, stages=", ".join(stages))
        return make_plan(loads(text, tmp_path / "recipe.yaml"), store)

    return plan


def test_a_step_is_done_once_and_found_again(planned, store):
    plan, told, seen = planned(PRUNED, RTN), Told(), []
    first = execute(plan, store, told, Settings(), lambda step, artifacts: seen.append((step.name, len(artifacts))))
    assert told.ended == [("1-prune-magnitude", "executed"), ("2-quantize-rtn", "executed")]
    assert seen == [("1-prune-magnitude", 1), ("2-quantize-rtn", 2)]
    again = execute(plan, store, Told(), Settings())
    assert again.statuses == {"1-prune-magnitude": "cached", "2-quantize-rtn": "cached"}
    assert {key: found.path for key, found in again.artifacts.items()} == {
        key: found.path for key, found in first.artifacts.items()
    }


@pytest.mark.slow
def test_a_step_that_the_second_store_has_is_fetched_and_one_that_was_run_is_put_there(
    planned, store, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPTIKIT_REMOTE_STORE", (tmp_path / "there").as_uri())
    monkeypatch.setenv("OPTIKIT_REMOTE_PUSH", "1")
    plan, told, other = planned(PRUNED, RTN), Told(), Store(tmp_path / "other")
    execute(plan, store, Told(), Settings())
    shutil.rmtree(tmp_path / "there" / "artifacts" / plan.steps[1].key)
    again = execute(plan, other, told, Settings())
    assert again.statuses == {"1-prune-magnitude": "cached", "2-quantize-rtn": "executed"}
    assert [note.split(" ")[1] for note in told.notes] == ["fetched", "put"]
    for key, found in again.artifacts.items():
        made = store.find(key)
        assert made is not None
        assert {n: each.sha256 for n, each in made.manifest.files.items()} == {
            n: each.sha256 for n, each in found.manifest.files.items()
        }


def test_until_leaves_out_what_comes_after(planned, store):
    plan = planned(PRUNED, RTN)
    assert execute(plan, store, Told(), Settings(until="1-prune-magnitude")).statuses == {
        "1-prune-magnitude": "executed"
    }
    assert store.find(plan.steps[1].key) is None


def test_a_step_that_fails_is_told_and_keeps_those_before_it(planned, store, tiny_llama, tmp_path):
    plan, told = planned(PRUNED, RTN), Told()
    execute(plan, store, Told(), Settings(until="1-prune-magnitude"))
    artifact = store.find(plan.steps[0].key)
    weights = artifact.path / "model.safetensors"
    weights.chmod(0o600)
    with weights.open("r+b") as file:  # the same size, and no header that can be read
        file.write(b"\xff" * 64)
    with pytest.raises(OptikitError) as failed:
        execute(plan, _Trusting(store.root), told, Settings())
    assert "2-quantize-rtn" in failed.value.message
    assert told.ended == [("1-prune-magnitude", "cached"), ("2-quantize-rtn", "failed")]
    assert store.find(plan.steps[1].key) is None


class _Remembering(Store):
    """A store that has read all of its files before: a bit that the disk lost since isn't seen by looking at them."""

    def find(self, key, **_):
        return super().find(key, verify="size")


class _Trusting(_Remembering):
    """A store that doesn't read what is used either: what damages a step's input comes to the step."""

    def require_intact(self, artifact):
        """Look at nothing."""


def test_what_the_disk_damaged_is_made_again_before_a_step_reads_it(planned, store, tmp_path):
    plan = planned(PRUNED, RTN)
    first = execute(plan, store, Told(), Settings())
    pruned, quantized = (first.artifacts[step.key].path / "model.safetensors" for step in plan.steps)
    before, whole = quantized.read_bytes(), pruned.read_bytes()
    quantized.parent.rename(tmp_path / "gone")
    pruned.write_bytes(whole[:-9] + bytes([whole[-9] ^ 0x10]) + whole[-8:])
    told: list[str] = []
    again = execute(plan, _Remembering(store.root, warn=told.append), Told(), Settings())
    assert again.statuses == {"1-prune-magnitude": "cached", "2-quantize-rtn": "executed"}
    assert (pruned.read_bytes(), quantized.read_bytes()) == (whole, before)
    assert len(told) == 1
    assert "model.safetensors: sha256 differs" in told[0]


def test_a_model_that_changed_while_it_was_worked_on_is_refused(tiny_llama, store, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    text = RECIPE.format(model=tmp_path / "model", target="cpu", stages=RTN)
    plan = make_plan(loads(text, tmp_path / "recipe.yaml"), store)
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match="isn't what it was"):
        execute(plan, store, Told(), Settings())


def test_what_was_emitted_stays_so_where_its_tools_are_not(planned, store):
    plan, told = planned(SERVED, target="l4"), Told()
    assert execute(plan, store, told, Settings()).statuses == {"1-compile-tensorrt-llm": "emitted"}
    assert execute(plan, store, told, Settings(resume=True)).statuses == {"1-compile-tensorrt-llm": "emitted"}
    assert [note for note in told.notes if note.startswith("1-compile-tensorrt-llm stays emitted: ")]


def test_one_run_at_a_time_makes_a_step(planned, store):
    plan = planned(RTN)
    with store.lock(plan.steps[0].key), pytest.raises(LockedError):
        execute(plan, store, Told(), Settings(lock_timeout=0.1))
    assert execute(plan, store, Told(), Settings()).statuses == {"1-quantize-rtn": "executed"}
    with store.lock(plan.steps[0].key):  # what is there needs no lock
        assert execute(plan, store, Told(), Settings(lock_timeout=0.1)).statuses == {"1-quantize-rtn": "cached"}


def test_a_stage_gets_the_target_only_where_it_declares_to_use_it(planned, store):
    from optikit.execution.execute import _Executor

    for stages, target, expected in (((RTN,), "cpu", None), ((SERVED,), "l4", "l4")):
        plan = planned(*stages, target=target)
        request = _Executor(plan, store, Told(), Settings())._request(plan.steps[0], None)
        assert (request["target"] and request["target"]["name"]) == expected
