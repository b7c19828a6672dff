"""The EAGLE-3 stage on a tiny model: trained or given, in either layout, and what its drafts do to no text."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from optikit import targets
from optikit.errors import IntegrityError, RecipeError, StageFailedError, UsageError
from optikit.models import eagle3 as drafters
from optikit.models.reader import read
from optikit.plan.make import make_plan
from optikit.recipe.load import load
from optikit.runtime.decoders.onnxruntime import OnnxDecoder
from optikit.runtime.decoders.transformers import TorchDecoder
from optikit.runtime.speculation import speculator, tuning
from optikit.runtime.speculation.batch_loop import write
from optikit.runtime.speculation.cost_model import measure_drafting
from optikit.runtime.speculation.decoding_loop import Request
from optikit.stage import Job
from optikit.stages.speculate import eagle3
from optikit.store.store import Store
from tests.conftest import build_tiny_llama, compile_onnx

SMALL = {"tokens": 1200, "new_tokens": 24, "eval_prompts": 8, "epochs": 8, "draft_vocab": 96, "unroll": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of four blocks whose texts don't end in one token said for ever."""
    directory = build_tiny_llama(tmp_path_factory.mktemp("model"), layers=4)
    tensors = load_file(directory / "model.safetensors")
    scaled = {name: each * (1 if each.dim() == 1 else 4) for name, each in tensors.items()}
    save_file(scaled, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def compiled(model, tmp_path_factory):
    return compile_onnx(model, tmp_path_factory.mktemp("compiled"))


def job_of(source, prompts, work, **inputs):
    for name in ("dest", "scratch"):
        (work / name).mkdir(parents=True, exist_ok=True)
    return Job(source=source, dest=work / "dest", scratch=work / "scratch", inputs={"prompts": prompts, **inputs})


@pytest.fixture(scope="module")
def made(model, prompts, tmp_path_factory):
    """(directory, facts) of the stage."""
    work = tmp_path_factory.mktemp("made")
    return work / "dest", eagle3.run(eagle3.Options(**SMALL), job_of(model, prompts, work))


@pytest.fixture(scope="module")
def authors(made, tmp_path_factory):
    """The same drafter as the authors of EAGLE write one, without the embeddings, and rows in another order."""
    directory = tmp_path_factory.mktemp("authors")
    told = json.loads((made[0] / "eagle3" / "config.json").read_text())
    layer = told["transformer_layer_config"] | {"draft_vocab_size": told["draft_vocab_size"]}
    layer["eagle_config"] = {drafters.LAYERS: told[drafters.LAYERS]}
    (directory / "config.json").write_text(json.dumps(layer | {"architectures": ["LlamaForCausalLM"]}))
    tensors = load_file(made[0] / "eagle3" / "model.safetensors")
    del tensors[drafters.EMBEDDING]
    order = torch.arange(len(tensors["d2t"])).flip(0)
    ids = (tensors["d2t"] + torch.arange(len(order)))[order]
    tensors |= {"d2t": ids - torch.arange(len(order)), "lm_head.weight": tensors["lm_head.weight"][order].clone()}
    save_file(
        {name.replace("layers.0.", "midlayer."): each for name, each in tensors.items()},
        directory / "model.safetensors",
    )
    return directory


def only(directory, **changes):
    return replace(speculator.read(directory), lengths={}, ahead_gate=0.0, **changes)


def test_it_learns_what_the_model_generates(made):
    _, facts = made
    assert facts["depths"] == [1, 2, 3]
    assert facts["started_from"] == "the model's last block"
    assert facts["validation"]["tokens_per_step"] > 1.3
    assert facts["training"]["best_epoch"] > 0
    json.dumps(facts)


@pytest.mark.parametrize("engine", ["transformers", "onnxruntime"])
def test_drafts_are_accepted_and_change_no_text(engine, made, model, compiled):
    decoder = (
        TorchDecoder(model, dtype="float32", threads=1)
        if engine == "transformers"
        else OnnxDecoder(compiled, threads=1)
    )
    speculating = speculator.speculating(decoder, only(made[0]), model)
    rng = np.random.default_rng(0)
    for length in (1, 2, 9, 300):  # longer than what is run at once
        prompt = rng.integers(3, 260, length)
        assert list(speculating.greedy(prompt, 40)) == list(decoder.greedy(prompt, 40))
    _, drafted, accepted = speculating.statistics.by["eagle3"]
    assert accepted > 0.1 * drafted


def test_lookup_before_it_leaves_no_gap_in_what_it_reads(made, model):
    """Where a lookup answers, nothing is read; the next time all of it is."""
    decoder = TorchDecoder(model, dtype="float32", threads=1)
    both = replace(only(made[0]), lengths={2: 2})
    speculating = speculator.speculating(decoder, both, model)
    prompt = np.tile(np.arange(5, 15), 4)
    assert list(speculating.greedy(prompt, 60)) == list(decoder.greedy(prompt, 60))
    assert {"lookup", "eagle3"} <= set(speculating.statistics.by)


def test_cached_drafts_are_those_of_the_loop(made, model):
    decoder = TorchDecoder(model, dtype="float32", threads=1)
    given = only(made[0])
    speculating = speculator.speculating(decoder, given, model)
    prompt = np.arange(10, 30)
    text = np.array(list(speculating.greedy(prompt, 40)))
    written = tuning.cache_drafts(given, decoder, tuning.Written(prompt, text))
    steps = tuning.replay(given.drafter(written.cached_drafts), written)
    assert sum(step.accepted for step in steps) == sum(speculating.statistics.accepted)
    costs = measure_drafting(given, prompt)
    assert costs.name == "eagle3"
    assert costs.ask_ms > 0 < costs.per_token_ms


def test_both_layouts_can_be_given_and_are_the_same_drafter(made, authors, model, prompts, tmp_path):
    trained = load_file(made[0] / "eagle3" / "model.safetensors")
    for source in (made[0] / "eagle3", authors):
        work = tmp_path / source.parent.name
        facts = eagle3.run(eagle3.Options(model="given"), job_of(model, prompts, work, drafter=source))
        assert facts["trained"] is False
        found = load_file(work / "dest" / "eagle3" / "model.safetensors")
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[name], trained[name]) for name in trained)


def test_servers_get_the_layout_of_speculators(made):
    told = json.loads((made[0] / "eagle3" / "config.json").read_text())
    assert told["speculators_model_type"] == "eagle3"
    assert told["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    tensors = load_file(made[0] / "eagle3" / "model.safetensors")
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (64, 128)
    assert tensors["fc.weight"].shape == (64, 192)
    assert int(tensors["t2d"].sum()) == len(tensors["d2t"]) == 96
    written = json.loads((made[0] / "speculator.json").read_text())
    assert written["servers"]["vllm"]["speculative_config"]["method"] == "eagle3"
    assert "vllm" in written["loads_in"]["eagle3"]


def test_a_drafter_of_another_model_is_refused(made, model, prompts, tmp_path):
    narrow = build_tiny_llama(tmp_path / "narrow", layers=4, hidden=32)
    shallow = build_tiny_llama(tmp_path / "shallow", layers=3)
    job = job_of(narrow, prompts, tmp_path / "work", drafter=made[0] / "eagle3")
    with pytest.raises(StageFailedError, match="reads states of width 64, the model has width 32"):
        eagle3.run(eagle3.Options(model="given"), job)
    facts = drafters.facts(made[0] / "eagle3")
    options = eagle3.Options(model="given")
    found = {each: [p.code for p in eagle3.fits(options, read(each), {"drafter": facts})] for each in (narrow, shallow)}
    assert found == {narrow: ["drafter-width"], shallow: ["drafter-depths"]}
    assert list(eagle3.fits(options, read(model), {"drafter": facts})) == []
    with pytest.raises(UsageError, match="reads states of width 64"):
        speculator.speculating(TorchDecoder(narrow, threads=1), only(made[0]))
    other = build_tiny_llama(tmp_path / "other", layers=4)
    with pytest.raises(UsageError, match="trained for weights"):
        speculator.speculating(TorchDecoder(other, threads=1), only(made[0]), other)


def test_numbers_that_are_none_are_named(made, model, prompts, tmp_path):
    broken = shutil.copytree(made[0] / "eagle3", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"layers.0.mlp.up_proj.weight holds NaN"):
        eagle3.run(eagle3.Options(model="given"), job_of(model, prompts, tmp_path / "work", drafter=broken))


def test_what_a_recipe_asks_in_vain_has_a_place(made, model, prompts, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    narrow = build_tiny_llama(tmp_path / "narrow", layers=4, hidden=32)
    recipe.write_text(
        f"model: {narrow}\ntarget: cpu\nstages:\n  - speculate:\n      method: eagle3\n"
        f"      prompts: {prompts}\n      model: {made[0] / 'eagle3'}\n"
    )
    with pytest.raises(RecipeError) as refused:
        make_plan(load(recipe), Store(tmp_path / "store"))
    problem = next(each for each in refused.value.problems if each.code == "drafter-width")
    assert "reads states of width 64, the model has width 32" in problem.message
    assert problem.mark.line == 7  # of the option that names the drafter
    with pytest.raises(ValidationError, match="leave epochs, tokens out, or `model`"):
        eagle3.Options(model="given", epochs=3, tokens=500)
    checked = [p.code for p in eagle3.check(eagle3.Options(depths=(1, 9)), read(model), targets.find("cpu"))]
    assert checked == ["drafter-depths"]


def test_several_texts_at_once_are_refused_in_words(made, model):
    decoder = speculator.speculating(TorchDecoder(model, threads=1), only(made[0]), model)
    prompts = [np.arange(5, 15), np.arange(20, 26)]
    requests = [Request(max_new_tokens=8) for _ in prompts]
    with pytest.raises(UsageError, match="one text at a time"):
        list(write(decoder, prompts, requests, batch=2))
    assert len({number for number, _ in write(decoder, prompts, requests, batch=1)}) == 2
