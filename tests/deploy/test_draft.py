"""Draft directories: what transformers really reads from them, and which drafts are refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from optikit.deploy import draft, vllm
from optikit.errors import UsageError
from optikit.models.reader import read


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A one-layer draft of the tiny model's vocabulary."""
    from tests.conftest import build_tiny_llama

    return build_tiny_llama(tmp_path_factory.mktemp("small"), layers=1)


@pytest.mark.parametrize("tokens", [2, 5])
def test_transformers_drafts_as_many_tokens_as_the_directory_says(tmp_path, tiny_llama, small, tokens):
    from transformers import AutoModelForCausalLM

    draft.write_draft(small, tmp_path / "draft", tokens=tokens, context=2048)
    target = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assistant = AutoModelForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float32)
    assert assistant.generation_config.num_assistant_tokens == tokens
    assert assistant.config.max_position_embeddings == 2048
    seen = []
    target.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    prompt = torch.tensor([[5, 6, 7, 8]])
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    assisted = target.generate(prompt, assistant_model=assistant, **settings)
    windows = seen[:]
    assert max(windows[1:]) == tokens + 1
    assert set(windows[1:-1]) <= {tokens + 1}
    assert torch.equal(assisted, target.generate(prompt, **settings))


def test_settings_that_were_there_stay(tmp_path, small):
    (tmp_path / "source").mkdir()
    for path in small.iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": 1, "num_assistant_tokens": 20}')
    draft.write_draft(tmp_path / "source", tmp_path / "draft", tokens=4, context=64, schedule="heuristic")
    settings = json.loads((tmp_path / "draft" / "generation_config.json").read_text())
    assert settings == {
        "eos_token_id": 1,
        "num_assistant_tokens": 4,
        "num_assistant_tokens_schedule": "heuristic",
        "assistant_confidence_threshold": 0.0,
    }
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512  # never lowered
    assert json.loads((small / "config.json").read_text())["max_position_embeddings"] == 512


def test_drafts_that_cannot_serve_are_refused_with_both_sides(tiny_llama, small):
    target, good = read(tiny_llama), read(small)
    assert not list(draft.problems(good, target))
    found = {
        problem.code: problem.message
        for other in (
            replace(good, vocab=256),
            replace(good, tokenizer_sha256="abc"),
            replace(good, sliding_window=128),
            replace(target, layers=3),
        )
        for problem in draft.problems(other, target)
    }
    assert set(found) == {"draft-vocabulary", "draft-tokenizer", "draft-window", "draft-too-large"}
    assert "256 rows, the model's 260" in found["draft-vocabulary"]
    assert "(abc)" in found["draft-tokenizer"]
    assert target.tokenizer_sha256[:12] in found["draft-tokenizer"]


def test_a_tokenizer_saved_again_by_another_version_is_the_same(tmp_path, tiny_llama, small):
    shutil.copytree(small, tmp_path / "again")
    path = tmp_path / "again" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": None, "version": "1.1"}, indent=2))
    again, target = read(tmp_path / "again"), read(tiny_llama)
    assert path.read_bytes() != (tiny_llama / "tokenizer.json").read_bytes()
    assert not list(draft.problems(again, target))


VLLM_KEYS = {
    *("method", "model", "num_speculative_tokens", "draft_tensor_parallel_size"),
    *("prompt_lookup_max", "prompt_lookup_min"),
}
"""Of vllm 0.33 config/speculative.py, those that are used here."""


def test_vllm_is_told_in_its_own_words():
    medusa = vllm.vllm("medusa", tokens=3, directory="/m/heads")
    assert medusa == {"method": "medusa", "model": "/m/heads", "num_speculative_tokens": 3}
    drafted = vllm.vllm("draft", tokens=4, directory="/m/draft", parallel=2)
    assert (drafted["method"], drafted["draft_tensor_parallel_size"]) == ("draft_model", 2)
    lookup = vllm.vllm("lookup", tokens=8)
    assert (lookup["method"], lookup["prompt_lookup_max"], lookup["prompt_lookup_min"]) == ("ngram", 3, 2)
    assert vllm.vllm("lookup", tokens=8, longest_match=1)["prompt_lookup_min"] == 1
    eagle = vllm.vllm("eagle3", tokens=4, directory="/m/eagle3")
    assert eagle == {"method": "eagle3", "model": "/m/eagle3", "num_speculative_tokens": 4}
    assert {*medusa, *drafted, *lookup} <= VLLM_KEYS
    with pytest.raises(UsageError, match="no speculation by 'eagle'"):
        vllm.vllm("eagle", tokens=1)


def test_lmi_gets_one_line_of_json():
    text = vllm.lmi_properties("/opt/ml/model", vllm.vllm("lookup", tokens=8))
    line = next(line for line in text.splitlines() if line.startswith("option.speculative_config="))
    assert json.loads(line.partition("=")[2])["method"] == "ngram"


def test_transformers_takes_the_arguments_it_is_given(tiny_llama):
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    plain = target.generate(prompt, **settings)
    seen = []
    target.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    looked_up = target.generate(prompt, **settings, **vllm.transformers_arguments("lookup", tokens=4))
    assert torch.equal(looked_up, plain)
    assert max(seen[1:]) == 5
    assert vllm.transformers_arguments("draft", tokens=4) == {}
    with pytest.raises(UsageError, match="no speculation by 'medusa'"):
        vllm.transformers_arguments("medusa", tokens=4)


def test_weights_configuration_and_tokenizer_go_along_as_copies_and_nothing_else(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "source")
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "training_args.bin", "modeling.py", "x.pkl"):
        (tmp_path / "source" / name).write_bytes(b"\x80\x04.")
    draft.write_draft(tmp_path / "source", tmp_path / "draft", tokens=4, context=64)
    before = {path.name for path in tiny_llama.iterdir()} | {"generation_config.json"}
    assert {path.name for path in (tmp_path / "draft").iterdir()} == before
    assert {path.stat().st_nlink for path in (tmp_path / "draft").iterdir()} == {1}
