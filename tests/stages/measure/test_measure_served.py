"""The step that has a model served: what it asks a server, what it makes of the answers, and what it refuses to ask.

A server over our own runtime stands here for vLLM, which tests/environments/test_vllm.py starts for real.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from optikit.errors import IntegrityError, StageFailedError, UnavailableError
from optikit.models.reader import read
from optikit.plan.measure_served import served_options
from optikit.recipe.schema import Evaluate
from optikit.runtime import vllm_server
from optikit.runtime.completions_client import Client
from optikit.runtime.decoders.vllm import ServedDecoder
from optikit.stage import Job
from optikit.stages.measure import quality, served
from tests.completions_server import Model, serving

WINDOWS = {"window": 24, "windows": 3}


@pytest.fixture(scope="module")
def model(tiny_onnx):
    return Model(tiny_onnx)


def job(dest, tiny_onnx, prose, **inputs):
    dest.mkdir()
    places = {"source": tiny_onnx, "dest": dest, "scratch": dest.with_name("scratch")}
    return Job(**places, inputs={"text": prose, "prompts": prose, "tokenizer": tiny_onnx, **inputs}, threads=1)


def test_it_scores_the_very_windows_that_other_runtimes_score(model, tiny_llama, tiny_onnx, prose, tmp_path):
    measured = quality.Options(runtime="onnxruntime", **WINDOWS)
    direct = quality.run(measured, job(tmp_path / "direct", tiny_onnx, prose))
    asked = job(tmp_path / "asked", tiny_onnx, prose, baseline=tmp_path / "direct")
    with serving(model) as server:
        client = Client(server.url, timeout_s=30)
        found = served._scored(served.Options(**WINDOWS), asked, client, read(tiny_llama))
    assert found["perplexity"]["value"] == pytest.approx(direct["perplexity"]["value"], rel=1e-6)
    assert found["perplexity"]["protocol"] == direct["perplexity"]["protocol"]
    assert found["perplexity"]["ratio"] == pytest.approx(1)
    assert found["top1_agreement"] == 1
    assert (found["runtime"], found["kl_divergence"], found["reason"]) == ("vllm", None, served.NO_DIVERGENCE)
    kept = np.load(tmp_path / "asked" / quality.NLL)
    np.testing.assert_allclose(kept, np.load(tmp_path / "direct" / quality.NLL), rtol=1e-6)


def test_a_server_that_does_not_echo_numbers_is_told(model, tiny_llama, tiny_onnx, prose, tmp_path):
    asked = job(tmp_path / "asked", tiny_onnx, prose)
    with serving(model, strict=True) as server:
        client = Client(server.url, timeout_s=30)
        with pytest.raises(StageFailedError, match="no log-probabilities"):
            served._scored(served.Options(**WINDOWS), asked, client, read(tiny_llama))


def test_it_times_prompts_of_exactly_so_many_tokens(model, tiny_onnx, prose, tmp_path):
    options = served.Options(timed=True, prompt_tokens=8, new_tokens=6, requests=3, concurrency=(1, 2))
    with serving(model) as server:
        client = Client(server.url, timeout_s=30)
        found = served._timed(options, job(tmp_path / "asked", tiny_onnx, prose), client)["served"]
    assert [(row["concurrency"], row["prompt_tokens_p50"], row["output_tokens_p50"]) for row in found["speed"]] == [
        (1, 8, 6),
        (2, 8, 6),
    ]


def test_an_arm_gets_the_tokens_that_the_server_writes(model, tiny_llama, monkeypatch, tmp_path):
    """The server of our own runtime in the place of vLLM: what the arm yields is what that runtime decodes."""
    prompt = np.arange(3, 12)
    with serving(model) as server:
        started = nullcontext((server.url, os.getpgid(0)))
        monkeypatch.setattr(vllm_server, "serving", lambda _how, **_: started)
        decoder = ServedDecoder(tiny_llama, threads=1, max_tokens=32, log=tmp_path / "log", hang_s=30)
        assert list(decoder.greedy(prompt, 7)) == list(model.decoder.greedy(prompt, 7))
    assert (decoder.runtime, decoder.dtype) == ("vllm", "bfloat16")
    assert decoder.peak_mib() > 50


def test_a_server_that_tells_no_numbers_of_tokens_is_refused(model, monkeypatch):
    with serving(model) as server:
        client = Client(server.url, timeout_s=30)
        monkeypatch.setattr(model, "write", lambda *_: iter([(2, 5, "a")]))
        with pytest.raises(UnavailableError, match="told 1 tokens of 4"):
            list(client.tokens("tiny", [1, 2], 4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"traits": frozenset({"int8_gptq"})}, "4 bits only"),
        ({"traits": frozenset({"int8_llm"})}, "with a plugin only"),
        ({"config": {"quantization_config": {"sym": False}}}, "symmetric grids only"),
        ({"head_dim": 16}, "these have 16"),
    ],
)
def test_what_vllm_does_not_load_is_refused_before_anything_runs(facts, target, changes, said):
    wide = replace(facts, head_dim=64)
    found = [each.message for each in served.check(served.Options(), replace(wide, **changes), target)]
    assert found == [] if said is None else said in found[0]


def test_prompts_that_do_not_fit_are_refused(facts, target):
    options = served.Options(timed=True, prompt_tokens=500, new_tokens=64)
    assert [each.code for each in served.check(options, replace(facts, head_dim=64), target)] == [
        "prompt-exceeds-context"
    ]


def test_a_speculator_says_how_the_server_drafts(tmp_path):
    written = {"servers": {"vllm": {"speculative_config": {"method": "medusa", "model": "speculator/vllm"}}}}
    (tmp_path / "speculator.json").write_text(json.dumps(written))
    assert vllm_server.speculation(tmp_path) == {"method": "medusa", "model": str(tmp_path / "vllm")}
    (tmp_path / "speculator.json").write_text("{}")
    with pytest.raises(IntegrityError, match="doesn't say how vLLM drafts"):
        vllm_server.speculation(tmp_path)


def test_the_recipe_decides_what_is_asked():
    speed = {"prompt_tokens": 32, "new_tokens": 16, "repetitions": 5}
    wanted = Evaluate.model_validate({"runtime": "vllm", "concurrency": [1, 8], "speed": {"prompts": "p", **speed}})
    found = served_options(wanted)
    assert found == {
        "scored": False,
        "timed": True,
        "prompt_tokens": 32,
        "new_tokens": 16,
        "requests": 5,
        "concurrency": (1, 8),
    }
    assert served.Options.model_validate(found).most_tokens == 48
