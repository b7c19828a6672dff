"""Speculation on real models: token for token what transformers' own generate writes."""

import numpy as np
import pytest
import torch

from optikit.algorithms.medusa import MedusaHeads
from optikit.runtime.acceptors import Greedy
from optikit.runtime.drafters import DraftModel, FirstOf, Medusa, PromptLookup, Silent
from optikit.runtime.speculate import Request, Statistics, generate
from optikit.runtime.torch_decoder import TorchDecoder


@pytest.fixture(scope="module")
def target(tiny_llama):
    return TorchDecoder(tiny_llama, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    from tests.conftest import build_tiny_llama

    return TorchDecoder(build_tiny_llama(tmp_path_factory.mktemp("small"), layers=1), dtype="float32", threads=1)


def heads_of(target: TorchDecoder) -> MedusaHeads:
    torch.manual_seed(0)
    heads = MedusaHeads(target._model.get_output_embeddings().weight, heads=3)
    with torch.no_grad():
        for each in heads.blocks.parameters():
            each.normal_(0, 0.05)
    return heads


def guess(heads: MedusaHeads):
    def call(hidden):
        tokens, probs = heads.guess(torch.from_numpy(hidden)[None])
        return tokens[0].numpy(), probs[0].numpy()

    return call


@pytest.mark.parametrize("min_window", [1, 2])
@pytest.mark.parametrize("name", ["silent", "lookup", "draft", "itself", "medusa", "all"])
def test_every_drafter_leaves_the_text_of_transformers(target, small, tiny_llama, name, min_window):
    lookup = PromptLookup({2: 5, 1: 2})
    drafter = {
        "silent": Silent,
        "lookup": lambda: lookup,
        "draft": lambda: DraftModel(small, vocab=260, length=4),
        "itself": lambda: DraftModel(TorchDecoder(tiny_llama, dtype="float32", threads=1), vocab=260, length=4),
        "medusa": lambda: Medusa(guess(heads_of(target))),
        "all": lambda: FirstOf([lookup, Medusa(guess(heads_of(target))), DraftModel(small, vocab=260)]),
    }[name]()
    counted = Statistics()
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(3, 260, 5 + 40 * seed).astype(np.int64)
        expected = list(target.greedy(prompt, 40))
        steps = list(generate(target, drafter, Greedy(), prompt, Request(max_new_tokens=40, min_window=min_window)))
        for step in steps:
            counted.add(step)
        assert [token for step in steps for token in step.tokens] == expected
    if name == "itself":
        assert counted.acceptance_length == pytest.approx(5, abs=0.3)  # all but the last window of a text are full


def test_hidden_states_are_what_the_output_head_reads(target):
    prompt = np.arange(10, 30, dtype=np.int64)
    logits = target.forward(prompt, 0, 4)
    weight = target._model.get_output_embeddings().weight.detach().numpy()
    for row in range(4):
        np.testing.assert_allclose(weight @ target.hidden(row), logits[row], rtol=1e-4, atol=1e-5)
    everything = target.forward(prompt, 0)
    np.testing.assert_allclose(everything[-4:], logits, rtol=1e-4, atol=1e-5)


def test_the_draft_directory_of_another_vocabulary_is_refused(small):
    from optikit.errors import UsageError

    assert isinstance(small._model.config.vocab_size, int)
    with pytest.raises(UsageError, match="vocabulary of 260 tokens, the model one of 49152"):
        DraftModel(small, vocab=49152)
