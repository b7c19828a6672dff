"""The Medusa stage on a tiny model: what it plans, what it writes, that a killed run goes on, and heads that guess."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from optikit import runtime, targets
from optikit.errors import InputMissingError, IntegrityError, StageFailedError, UsageError
from optikit.models.reader import read
from optikit.runtime.decoders.transformers import TorchDecoder
from optikit.runtime.generate import TextGenerator
from optikit.runtime.speculation import speculator
from optikit.runtime.speculation.fingerprint import weights_digest
from optikit.runtime.speculation.medusa_session import HeadSession
from optikit.stage import Job
from optikit.stages.measure import speculation
from optikit.stages.speculate import medusa
from optikit.training import self_generated

SMALL = {"heads": 2, "tokens": 1200, "new_tokens": 24, "eval_prompts": 8, "epochs": 12, "draft_vocab": 64}


@pytest.fixture(scope="module")
def made(tiny_gptq, prompts, tmp_path_factory):
    """(directory, facts) of the stage on packed 4-bit weights."""
    work = tmp_path_factory.mktemp("medusa")
    return work / "dest", perform(tiny_gptq, prompts, work)


def job_of(source, prompts, work):
    for name in ("dest", "scratch"):
        (work / name).mkdir(parents=True, exist_ok=True)
    return Job(source=source, dest=work / "dest", scratch=work / "scratch", inputs={"prompts": prompts})


def perform(source, prompts, work, **changes):
    return medusa.run(medusa.Options(**SMALL | changes), job_of(source, prompts, work))


def test_self_generated_text_is_what_greedy_decoding_writes(tiny_llama, tmp_path):
    decoder = TorchDecoder(tiny_llama, dtype="float32", threads=1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 260, length).tolist() for length in (5, 9, 3, 12, 7)]
    ends = frozenset({list(decoder.greedy(np.array(prompts[0]), 6))[-1]})
    text = self_generated.write(
        decoder.model, prompts, new_tokens=20, ends=ends, folder=tmp_path, most=(3, self_generated.ROOM)
    )
    lengths = []
    for number, prompt in enumerate(prompts):
        whole = list(decoder.greedy(np.array(prompt), 20))
        count = next((i + 1 for i, token in enumerate(whole) if token in ends), 20)
        mine = text.documents == number
        assert text.tokens[mine].tolist() == [prompt[-1], *whole[:count]]
        assert text.wanted[mine].tolist() == [False] + [True] * count
        decoder.forward(np.array(prompt + whole[:count]), 0)
        states = [decoder.hidden(len(prompt) - 1 + i) for i in range(count)]
        np.testing.assert_allclose(text.hidden[mine][:-1], states, atol=1e-4)
        lengths.append(count)
    assert min(lengths) < 20 == max(lengths)  # one row left its batch early


def test_finished_batches_are_not_written_again_and_damaged_ones_are(tiny_llama, tmp_path):
    model = TorchDecoder(tiny_llama, dtype="float32", threads=1).model
    settings = {"new_tokens": 6, "ends": frozenset(), "folder": tmp_path, "most": (2, 8192)}
    prompts = [[5, 6], [7, 8, 9], [10]]
    first = self_generated.write(model, prompts, **settings)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:50])
    before = files[0].stat().st_mtime_ns
    again = self_generated.write(model, prompts, **settings)
    assert files[0].stat().st_mtime_ns == before
    for name in ("tokens", "documents", "wanted", "hidden"):
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_texts_are_held_back_whole(tiny_llama, tmp_path):
    model = TorchDecoder(tiny_llama, dtype="float32", threads=1).model
    text = self_generated.write(model, [[i] for i in range(5, 25)], new_tokens=4, ends=frozenset(), folder=tmp_path)
    learning, held = self_generated.divide(text, 0.1)
    assert len(held.documents.unique()) == 2
    assert not set(learning.documents.tolist()) & set(held.documents.tolist())
    assert learning.written + held.written == text.written == 80


def test_heads_know_their_model(made, tiny_gptq, tmp_path):
    for name, source in (("model", tiny_gptq), ("speculator", made[0])):
        shutil.copytree(source, tmp_path / name)
    weights = tmp_path / "model" / "model.safetensors"
    assert HeadSession(made[0] / "heads.safetensors").base == weights_digest(tiny_gptq)
    runtime.load(tmp_path, threads=1)
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    digests = [weights_digest(each)[:12] for each in (tiny_gptq, tmp_path / "model")]
    with pytest.raises(UsageError, match=rf"trained for weights {digests[0]}, and .*model holds {digests[1]}"):
        runtime.load(tmp_path, threads=1)


def test_heads_learn_what_the_model_generates(made):
    directory, facts = made
    assert facts["self_generated_texts"] >= 50
    assert facts["validation"]["top1"][0] > 0.3  # of 260 tokens
    assert facts["training"]["losses"][-1] < facts["training"]["losses"][0]
    assert 0 < facts["draft_vocab_coverage"] <= 1
    heads = HeadSession(directory / "heads.safetensors")
    assert (heads.heads, heads.width, heads.vocab) == (2, 64, 260)
    steps = [json.loads(line) for line in (directory / "training.jsonl").read_text().splitlines()]
    assert all(step["gradient_norm_0"] > 0 and step["gradient_norm_1"] > 0 for step in steps)
    json.dumps(facts)


def test_the_session_guesses_what_the_tensors_say(made):
    directory, _ = made
    found = load_file(directory / "heads.safetensors")
    heads = HeadSession(directory / "heads.safetensors")
    agreed = 0
    for seed in range(30):
        state = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        tokens, probs = heads(state.numpy(), 0)
        for head in range(2):
            x = state + torch.nn.functional.silu(found[f"{head}.0.weight"] @ state + found[f"{head}.0.bias"])
            best = (found["output"].float() @ x).softmax(0).max(0)
            agreed += int(found["token_ids"][best.indices]) == tokens[head]
            assert probs[head] == pytest.approx(float(best.values), abs=0.02)
    assert agreed >= 56  # near-ties may fall otherwise where weights are rounded


def test_servers_get_their_layouts_and_the_manifest_says_which(made):
    directory, facts = made
    v1 = load_file(directory / "v1" / "medusa_lm_head.safetensors")
    assert {name for name in v1 if name.startswith("1.")} == {"1.0.linear.weight", "1.0.linear.bias", "1.1.weight"}
    assert v1["0.1.weight"].shape == (260, 64)
    assert "architectures" not in json.loads((directory / "v1" / "config.json").read_text())
    assert "lm_heads.0.weight" in load_file(directory / "vllm" / "model.safetensors")
    written = json.loads((directory / "speculator.json").read_text())
    assert set(written["loads_in"]) == set(facts["loads_in"]) == {"v1", "vllm"}
    assert written["loads_in"]["vllm"]["vllm"].endswith("<0.33")


def test_a_run_measures_lookup_and_heads_and_chooses(made, tiny_gptq, tiny_onnx_int4, prompts, tmp_path):
    (tmp_path / "dest").mkdir()
    inputs = {"speculator": made[0], "tokenizer": tiny_gptq, "prompts": prompts}
    job = Job(source=tiny_onnx_int4, dest=tmp_path / "dest", scratch=tmp_path, inputs=inputs, threads=1)
    options = speculation.Options(runtime="onnxruntime", prompts=8, new_tokens=24, datastore_answers=8)
    facts = speculation.run(options, job)
    found = facts["speculation"]
    assert found["method"] == "medusa"
    assert found["chosen"] in ("medusa", "lookup", "off")
    assert found["unexplained"] == 0
    assert set(found["predicted_single_drafter"]) == {"lookup", "medusa"}
    assert min(found["predicted_single_drafter"].values()) >= 1
    assert found["drafting_ms"]["ask"] > 0
    alone = tmp_path / "alone"
    shutil.copytree(made[0], alone)
    only = replace(speculator.read(made[0]), lengths={}, ahead_gate=0.0)
    (alone / "speculator.json").write_text(json.dumps(only.as_json()))
    job = replace(job, inputs=inputs | {"speculator": alone})
    forced = speculation.run(options.model_copy(update={"tune": False}), job)["speculation"]
    assert forced["by_drafter"]["medusa"]["accepted"] > 0
    assert forced["unexplained"] == 0


@pytest.fixture(scope="module")
def sequential(tiny_gptq, prompts, tmp_path_factory):
    """(directory, facts) of the stage with heads that see the tokens drafted before theirs."""
    work = tmp_path_factory.mktemp("sequential")
    return work / "dest", perform(tiny_gptq, prompts, work, sequential=True, epochs=6)


def test_sequential_heads_are_for_this_runtime_alone(sequential):
    directory, facts = sequential
    written = json.loads((directory / "speculator.json").read_text())
    assert set(written["loads_in"]) == set(facts["loads_in"]) == {"sequential"}
    assert set(facts["loads_in"]["sequential"]) == {"optikit"}
    assert written["servers"] == {}
    assert not (directory / "v1").exists()
    assert not (directory / "vllm").exists()
    found = load_file(directory / "heads.safetensors")
    assert found["embedding"].shape == (260, 64)
    assert all(found[f"input.{head}"].abs().max() > 0 for head in range(2))


def test_sequential_heads_draft_what_is_accepted_and_change_no_text(sequential, tiny_gptq, prompts):
    decoder = TorchDecoder(tiny_gptq, dtype="float32", threads=1)
    only = replace(speculator.read(sequential[0]), lengths={}, ahead_gate=0.0)
    assert only.heads.sequential
    speculating = speculator.speculating(decoder, only)
    generator = TextGenerator(decoder, tiny_gptq)
    for line in prompts.read_text().splitlines()[:4]:
        prompt = generator.encode(json.loads(line)["prompt"], chat=True)
        assert list(speculating.greedy(prompt, 40)) == list(decoder.greedy(prompt, 40))
    _, drafted, accepted = speculating.statistics.by["medusa"]
    assert accepted > 0.1 * drafted
    assert sequential[1]["validation"]["top1"][1] > 0.3


def test_heads_of_another_model_are_refused(made, tiny_onnx, tmp_path):
    from optikit import runtime
    from tests.conftest import build_tiny_llama

    other = TorchDecoder(build_tiny_llama(tmp_path, hidden=32), dtype="float32", threads=1)
    with pytest.raises(UsageError, match=r"width 64 and know 260 tokens; the model has width 32 and 260"):
        speculator.speculating(other, speculator.read(made[0]))
    assert list(runtime.load(tiny_onnx, threads=1, speculator=made[0]).greedy(np.arange(5, 20), 12)) == list(
        runtime.load(tiny_onnx, threads=1).greedy(np.arange(5, 20), 12)
    )


def test_damaged_heads_are_named(made, tmp_path):
    broken = tmp_path / "heads.safetensors"
    broken.write_bytes((made[0] / "heads.safetensors").read_bytes()[:-40])
    with pytest.raises(IntegrityError, match="doesn't hold Medusa heads"):
        HeadSession(broken)
    with pytest.raises(IntegrityError, match="doesn't hold Medusa heads"):
        HeadSession(tmp_path / "nothing.safetensors")


def test_too_few_prompts_are_named(tiny_llama, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "one"}\n')
    with pytest.raises(InputMissingError, match="has 1 prompts; 4 are needed"):
        perform(tiny_llama, few, tmp_path)
    few.write_text("\n".join(json.dumps({"prompt": f"one {i}"}) for i in range(6)))
    with pytest.raises(InputMissingError, match=r"has 2 prompts of at most \d+ tokens beside the 4 that evaluate"):
        perform(tiny_llama, few, tmp_path)


def test_bad_numbers_in_the_model_stop_the_training(tiny_llama, prompts, tmp_path):
    from safetensors.torch import save_file

    source = tmp_path / "broken"
    shutil.copytree(tiny_llama, source)
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageFailedError, match="before there were any good weights"):
        perform(source, prompts, tmp_path)


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ({}, []),
        ({"draft_vocab": 64}, []),
        ({"share_lm_head": False}, []),
        ({"share_lm_head": False, "draft_vocab": 64}, ["head-vocabulary"]),
        ({"share_lm_head": False, "draft_vocab": 64, "layouts": ()}, []),
        ({"layouts": ("nxdi",), "layers": 2}, ["nxdi-layers"]),
        ({"sequential": True}, []),
        ({"sequential": True, "layouts": ()}, []),
        ({"sequential": True, "layouts": ("vllm",)}, ["sequential-layouts"]),
        ({"sequential": True, "share_lm_head": False, "draft_vocab": 64}, []),
        ({"template": "{context} {question}"}, []),
        ({"template": "{0.__class__}"}, ["bad-template"]),
        ({"template": "{context"}, ["bad-template"]),
    ],
)
def test_what_cannot_work_is_said_before(tiny_llama, options, codes):
    found = medusa.check(medusa.Options(**options), read(tiny_llama), targets.find("cpu"))
    assert [problem.code for problem in found] == codes


def test_two_budgets_are_refused():
    with pytest.raises(ValidationError, match="give one of epochs, steps, not epochs and steps"):
        medusa.Options(steps=3, epochs=2)
