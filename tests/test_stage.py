"""What holds for every stage, and what a stage that breaks its own declaration runs into."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import Field

from optikit import stages, targets
from optikit.execution import worker
from optikit.plan import make_plan
from optikit.recipe.load import loads
from optikit.stage import (
    ANY,
    MAIN,
    Emitting,
    Estimate,
    Input,
    Inputs,
    Speculating,
    StageOptions,
    UndeclaredInputError,
    no_objection,
    nothing,
)
from optikit.stages.speculate import lookup
from optikit.store.store import Store

LEFT_BY = {
    "acquire": "source",
    "prune": "model",
    "finetune": "model",
    "quantize": "model",
    "speculate": "speculator",
    "compile": "engine",
    "measure": "measurement",
}
EVERY = [
    (verb, method, backend)
    for verb in LEFT_BY
    for method in stages.methods(verb)
    for backend in stages.backend_names(verb, method)
]
each_stage = pytest.mark.parametrize("who", EVERY, ids="-".join)


@each_stage
def test_a_stage_declares_everything(who):
    stage = stages.load(*who)
    assert LEFT_BY[who[0]] == stage.WRITES
    assert isinstance(stage.USES_TARGET, bool)
    assert stage.ENVIRONMENT is None or isinstance(stage.ENVIRONMENT, str)
    declared = stage.inputs(stage.Options.model_construct(arms=(), tasks=()))
    assert all(isinstance(one, Input) for one in declared.values())
    for one in declared.values():
        assert not one.option or one.option in stage.Options.model_fields
    assert callable(stage.fits)
    assert isinstance(stage, Speculating) == (stage.WRITES == "speculator")
    assert not isinstance(stage, Emitting) or stage.WRITES == "engine"


def toy(**members: Any) -> ModuleType:
    """Return a stage that copies nothing and finds nothing, with some of its names replaced."""
    module = ModuleType("optikit.stages.quantize.toy")
    usual = {
        "SUMMARY": "a toy",
        "NEEDS": ANY,
        "WRITES": "measurement",
        "USES_TARGET": False,
        "LIBRARIES": (),
        "ENVIRONMENT": MAIN,
        "Options": StageOptions,
        "inputs": nothing,
        "fits": no_objection,
        "check": lambda *_: iter(()),
        "estimate": lambda *_: Estimate(seconds=1, peak_bytes=1, disk_bytes=1),
        "after": lambda _, facts: facts,
    }
    vars(module).update(usual | members)
    return module


def performed(stage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what a worker answers that does a job with this stage."""
    monkeypatch.setitem(sys.modules, stage.__name__, stage)
    for name in ("dest", "scratch", "job"):
        (tmp_path / name).mkdir()
    request = {
        "verb": "quantize",
        "method": "toy",
        "options": {},
        "source": str(tmp_path),
        "dest": str(tmp_path / "dest"),
        "scratch": str(tmp_path / "scratch"),
        "inputs": {"secret": str(tmp_path)},
        "calibration": {"text": str(tmp_path), "samples": 1, "length": 1},
        "seed": 0,
        "device": "cpu",
        "threads": 1,
        "max_memory_bytes": None,
        "target": json.loads(json.dumps(vars(targets.find("cpu")), default=str)),
    }
    (tmp_path / "job" / "request.json").write_text(json.dumps(request))
    worker.main(tmp_path / "job")
    answer: dict[str, Any] = json.loads((tmp_path / "job" / "response.json").read_text())
    return answer


@pytest.mark.parametrize("ask", [lambda job: job.inputs["secret"], lambda job: "secret" in job.inputs])
def test_reading_an_undeclared_input_fails(ask, tmp_path, monkeypatch):
    answer = performed(toy(run=lambda _, job: {"found": str(ask(job))}), tmp_path, monkeypatch)
    assert not answer["ok"]
    assert "input 'secret' is not declared by the stage's `inputs(options)`" in answer["message"]


def test_a_declared_input_is_there(tmp_path, monkeypatch):
    stage = toy(
        inputs=lambda _: {"secret": Input(of="original")},
        run=lambda _, job: {"found": str(job.inputs["secret"])},
    )
    assert performed(stage, tmp_path, monkeypatch)["facts"] == {"found": str(tmp_path)}


def test_a_stage_that_does_not_declare_target_or_calibration_gets_neither(tmp_path, monkeypatch):
    stage = toy(run=lambda _, job: {"target": job.target, "calibration": job.calibration})
    assert performed(stage, tmp_path, monkeypatch)["facts"] == {"target": None, "calibration": None}


def test_inputs_are_what_was_found_of_what_was_declared():
    found = Inputs({"text": Path("a"), "other": Path("b")}, ["text", "baseline"])
    assert dict(found) == {"text": Path("a")}
    assert "baseline" not in found
    assert found.get("baseline") is None
    for ask in (found.get, found.__getitem__, found.__contains__):
        with pytest.raises(UndeclaredInputError, match="'other'"):
            ask("other")


RECIPE = """
model: {model}
stages:
  - speculate: {{method: {method}, {option}: {prompts}}}
  - compile: {{engine: onnxruntime}}
"""


def planned(place: Path, model: Path, method: str, option: str, prompts: Path) -> Any:
    text = RECIPE.format(model=model, method=method, option=option, prompts=prompts)
    return make_plan(loads(text, place / "recipe.yaml"), Store(place / "store"))


class Renamed(StageOptions):
    """The options of lookup, one of them by another name."""

    sentences: str = Field(default="", description="Prompts.")

    def as_lookup(self) -> lookup.Options:
        return lookup.Options(prompts=self.sentences)


def by_another_name(function: Any) -> Any:
    return lambda options, *more: function(options.as_lookup(), *more)


def test_an_option_renamed_changes_nothing_elsewhere(tmp_path, tiny_llama, monkeypatch):
    renamed = ModuleType("optikit.stages.speculate.renamed")
    vars(renamed).update({name: value for name, value in vars(lookup).items() if not name.startswith("__")})
    renamed.Options = Renamed
    for name in ("check", "estimate", "after", "inputs", "measured"):
        vars(renamed)[name] = by_another_name(getattr(lookup, name))
    monkeypatch.setitem(sys.modules, renamed.__name__, renamed)
    known = {verb: stages.methods(verb) for verb in stages.VERBS}
    known["speculate"] += ("renamed",)
    monkeypatch.setattr(stages, "methods", known.__getitem__)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"word {index}"}) for index in range(60)))
    usual = planned(tmp_path, tiny_llama, "lookup", "prompts", prompts)
    other = planned(tmp_path, tiny_llama, "renamed", "sentences", prompts)
    assert other.steps[0].files == usual.steps[0].files
    assert Path(other.steps[0].files["prompts"]).read_bytes() == prompts.read_bytes()
    assert [each.name for each in other.measures] == [each.name for each in usual.measures] == ["measure-speculation"]
    assert other.measures[0].options == usual.measures[0].options
    before = other.steps[0].key
    prompts.write_text("\n".join(json.dumps({"prompt": f"another {index}"}) for index in range(60)))
    assert planned(tmp_path, tiny_llama, "renamed", "sentences", prompts).steps[0].key != before


def test_the_target_is_part_of_a_key_only_where_a_stage_uses_it(tmp_path, tiny_llama):
    stages_written = "[prune: {method: magnitude}, compile: {engine: tensorrt}]"
    keys = []
    for name in ("l4", "l40s"):
        text = f"model: {tiny_llama}\ntarget: {name}\nstages: {stages_written}"
        plan = make_plan(loads(text, tmp_path / "recipe.yaml"), Store(tmp_path / "store"))
        keys.append([step.key for step in plan.steps])
    assert [one == other for one, other in zip(*keys, strict=True)] == [True, False]
