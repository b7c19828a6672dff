"""The draft stage on tiny models: given drafts are checked when planned, made ones learn, and both leave every text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from optikit import runtime, targets
from optikit.errors import RecipeError, StageFailedError
from optikit.models.reader import read
from optikit.plan import make_plan
from optikit.recipe.load import load
from optikit.runtime.decoders.transformers import TorchDecoder
from optikit.runtime.speculation import speculator
from optikit.stage import Job
from optikit.stages.measure import speculation
from optikit.stages.speculate import draft
from optikit.store.store import Store
from optikit.training import draft_model
from tests.conftest import build_tiny_llama

MAKE = {"layers": 2, "tokens": 1200, "epochs": 4, "learning_rate": 0.005}
SMALL = {"new_tokens": 24, "eval_prompts": 8, "make": MAKE, "precision": "fp32"}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return build_tiny_llama(tmp_path_factory.mktemp("target"), layers=4)


@pytest.fixture(scope="module")
def made(target, prompts, tmp_path_factory):
    """(directory, facts) of a draft made of two of four blocks."""
    work = tmp_path_factory.mktemp("draft")
    return work / "dest", perform(target, prompts, work)


def job_of(source, prompts, work):
    for name in ("dest", "scratch"):
        (work / name).mkdir(parents=True, exist_ok=True)
    return Job(source=source, dest=work / "dest", scratch=work / "scratch", inputs={"prompts": prompts}, threads=1)


def perform(source, prompts, work, **changes):
    return draft.run(draft.Options(**SMALL | changes), job_of(source, prompts, work))


def test_a_made_draft_learns_to_write_what_the_model_writes(made, target):
    directory, facts = made
    history = facts["training"]
    assert history["epochs"] == 4
    assert max(history["agreement"][1:]) > history["agreement"][0]
    assert history["losses"][-1] < history["losses"][0]
    assert len(facts["blocks_kept"]) == 2
    assert facts["blocks_kept"][0] == 0
    assert (directory / "draft" / "generation_config.json").is_file()
    written = read(directory / "draft")
    assert (written.layers, written.vocab) == (2, 260)
    assert written.tokenizer_sha256 == read(target).tokenizer_sha256
    json.dumps(facts)


def test_the_compiled_draft_is_the_directory_for_servers(made):
    directory, _ = made
    text = np.random.default_rng(0).integers(3, 259, 30)
    compiled = runtime.load(directory / "draft" / "onnxruntime", threads=1).forward(text, 0)
    served = runtime.load(directory / "draft", runtime="transformers", dtype="float32", threads=1).forward(text, 0)
    np.testing.assert_allclose(compiled, served, atol=1e-4)


def test_shortening_everything_away_but_nothing_changes_nothing(target):
    model = TorchDecoder(target, dtype="float32", threads=1).model
    tokens = torch.arange(5, 40)[None]
    whole = draft_model.shortened(model, "model.layers", [0, 1, 2, 3])
    part = draft_model.shortened(model, "model.layers", [0, 3])
    with torch.no_grad():
        assert torch.allclose(whole(tokens).logits, model(tokens).logits, atol=1e-6)
        assert not torch.allclose(part(tokens).logits, model(tokens).logits, atol=1e-3)
    assert len(model.model.layers) == 4
    assert [block.self_attn.layer_idx for block in part.model.layers] == [0, 1]


def test_a_run_measures_and_every_text_stays(made, target, prompts, tmp_path):
    for name in ("dest", "alone"):
        (tmp_path / name).mkdir()
    inputs = {"speculator": made[0], "tokenizer": target, "prompts": prompts}
    job = Job(source=target, dest=tmp_path / "dest", scratch=tmp_path, inputs=inputs, threads=1)
    options = speculation.Options(runtime="transformers", prompts=8, new_tokens=24, datastore_answers=8)
    facts = speculation.run(options, job)
    assert facts["speculation"]["method"] == "draft"
    assert facts["speculation"]["exact_match"] + facts["speculation"]["explained_ties"] / 4 == 1
    assert set(facts["speculation"]["predicted_single_drafter"]) == {"lookup", "draft"}
    assert facts["speculation"]["drafting_ms"]["per_token"] > 0
    only = replace(speculator.read(made[0]), lengths={}, ahead_gate=0.0)
    (tmp_path / "alone" / "speculator.json").write_text(json.dumps(only.as_json()))
    (tmp_path / "alone" / "draft").symlink_to(made[0] / "draft")
    job = replace(job, inputs=inputs | {"speculator": tmp_path / "alone"})
    forced = speculation.run(options.model_copy(update={"tune": False}), job)["speculation"]
    assert forced["by_drafter"]["draft"]["accepted"] > 0
    assert forced["unexplained"] == 0
    assert (forced["chosen"] == "off") == (min(forced["speedup"]["value"], forced["predicted_speedup"]) < 1.03)


# ------------------------------------------------------------------------------------------------------- given drafts


@pytest.fixture
def plan_with(tmp_path, target, prompts):
    def planned(model):
        stages = [
            {"speculate": {"method": "draft", "model": str(model), "prompts": str(prompts), "new_tokens": 24}},
            {"compile": {"engine": "onnxruntime", "head": "float32"}},
        ]
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": str(target), "stages": stages}))
        return make_plan(load(path), Store(tmp_path / "home"))

    return planned


def problem_of(plan_with, model):
    with pytest.raises(RecipeError) as caught:
        plan_with(model)
    return next(problem for problem in caught.value.problems if problem.level == "error")


def test_a_given_draft_is_planned_and_used(plan_with, tmp_path, prompts, target):
    small = build_tiny_llama(tmp_path / "small", layers=1)
    step = plan_with(small).steps[0]
    assert Path(step.files["draft"]) == small
    job = job_of(target, prompts, tmp_path)
    job = replace(job, inputs={**job.inputs, "draft": small})
    facts = draft.run(draft.Options(model=str(small), precision="fp32"), job)
    assert facts["draft_layers"] == 1
    assert "self_generated_tokens" not in facts
    decoder = runtime.load(target, dtype="float32", threads=1, speculator=tmp_path / "dest")
    text = np.arange(5, 25)
    assert list(decoder.greedy(text, 30)) == list(runtime.load(target, dtype="float32", threads=1).greedy(text, 30))


def test_other_contents_are_another_step(plan_with, tmp_path):
    small = build_tiny_llama(tmp_path / "small", layers=1)
    before = plan_with(small).steps[0].key
    narrow = build_tiny_llama(tmp_path / "narrow", layers=1, intermediate=64)
    shutil.rmtree(small)
    narrow.rename(small)
    assert plan_with(small).steps[0].key != before


def test_another_tokenizer_is_refused_with_both_hashes(plan_with, tmp_path, target):
    other = build_tiny_llama(tmp_path / "other", layers=1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["special"] = False
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = problem_of(plan_with, other)
    assert found.code == "draft-tokenizer"
    assert read(other).tokenizer_sha256[:12] in found.message
    assert read(target).tokenizer_sha256[:12] in found.message


def test_another_vocabulary_is_refused_with_both_sizes(plan_with, tmp_path):
    other = build_tiny_llama(tmp_path / "other", layers=1)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([table, table[:4]])
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 264}))
    found = problem_of(plan_with, other)
    assert found.code == "draft-vocabulary"
    assert "264" in found.message
    assert "260" in found.message


def test_a_draft_as_large_as_the_model_is_refused(plan_with, target):
    assert problem_of(plan_with, target).code == "draft-too-large"


def test_a_draft_that_changed_since_it_was_planned_is_refused(tmp_path, target, prompts):
    wide = build_tiny_llama(tmp_path / "wide", layers=6)
    job = job_of(target, prompts, tmp_path)
    with pytest.raises(StageFailedError, match="drafting can't pay"):
        draft.run(draft.Options(model=str(wide)), replace(job, inputs={**job.inputs, "draft": wide}))


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ({"make": {"layers": 1}}, []),
        ({"make": {"layers": 4}}, ["draft-too-large"]),
        ({}, ["draft-too-large"]),  # six blocks by default, and the model has four
        ({"model": "small"}, []),
    ],
)
def test_what_cannot_work_is_said_before(target, options, codes):
    found = draft.check(draft.Options(**options), read(target), targets.find("cpu"))
    assert [problem.code for problem in found] == codes


def test_a_draft_is_given_or_made():
    with pytest.raises(ValidationError, match="not both"):
        draft.Options(model="small", make={"layers": 2})


def test_two_budgets_are_refused():
    with pytest.raises(ValidationError, match="give one of epochs, steps, not epochs and steps"):
        draft.Make(steps=3, epochs=2)
