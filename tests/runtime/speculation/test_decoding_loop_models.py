"""Speculation on real models: token for token what transformers' own generate writes; sampled as it samples alone."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from optikit import runtime
from optikit.algorithms.medusa import MedusaHeads
from optikit.runtime.decoders.transformers import TorchDecoder
from optikit.runtime.speculation.acceptors import Greedy, Rejection, SampleMatch, Sampling, Typical
from optikit.runtime.speculation.decoding_loop import Request, Statistics, generate
from optikit.runtime.speculation.drafters import DraftModel, FirstOf, Medusa, NoDraft, PromptLookup


@pytest.fixture(scope="module")
def target(tiny_llama):
    return TorchDecoder(tiny_llama, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    from tests.conftest import build_tiny_llama

    return TorchDecoder(build_tiny_llama(tmp_path_factory.mktemp("small"), layers=1), dtype="float32", threads=1)


def heads_of(target: TorchDecoder, *, sequential: bool = False) -> MedusaHeads:
    torch.manual_seed(0)
    embedding = target._model.get_input_embeddings().weight if sequential else None
    heads = MedusaHeads(target._model.get_output_embeddings().weight, heads=3, embedding=embedding)
    with torch.no_grad():
        for each in (*heads.blocks.parameters(), *heads.inputs.parameters()):
            each.normal_(0, 0.05)
    return heads


def guess(heads: MedusaHeads):
    def call(hidden, newest):
        tokens, probs = heads.guess(torch.from_numpy(hidden)[None], torch.tensor([newest]))
        return tokens[0].numpy(), probs[0].numpy()

    return call


@pytest.mark.parametrize("min_window", [1, 2])
@pytest.mark.parametrize("name", ["silent", "lookup", "draft", "itself", "medusa", "sequential", "all"])
def test_every_drafter_leaves_the_text_of_transformers(target, small, tiny_llama, name, min_window):
    lookup = PromptLookup({2: 5, 1: 2})
    drafter = {
        "silent": NoDraft,
        "lookup": lambda: lookup,
        "draft": lambda: DraftModel(small, vocab=260, length=4),
        "itself": lambda: DraftModel(TorchDecoder(tiny_llama, dtype="float32", threads=1), vocab=260, length=4),
        "medusa": lambda: Medusa(guess(heads_of(target))),
        "sequential": lambda: Medusa(guess(heads_of(target, sequential=True))),
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


SERVED = Sampling(temperature=0.8, top_p=0.95)


def sharper(logits, _text):
    """Six times as far apart: a model that was never trained is sure of nothing."""
    return logits * np.float32(6)


def first_tokens(target, drafter, acceptor, prompt, draws, processors):
    """Return counts (2, vocab) of the first two sampled tokens, and how many of the second were drafted and kept."""
    counts, kept = np.zeros((2, target.vocab)), 0
    for seed in range(draws):
        request = Request(max_new_tokens=3, processors=processors, seed=seed)
        steps = generate(target, drafter, acceptor, prompt, request)
        first, second = next(steps), next(steps)
        kept += second.accepted > 0
        for place, token in enumerate((*first.tokens, second.tokens[0])):
            counts[place, token] += 1
    return counts, kept


def exact_marginals(target, prompt, processors):
    """Return the distributions (2, vocab) of the first two tokens, by running every first one that can be drawn."""

    def after(text):
        row = target.forward(text, 0, 1)[0]
        for process in processors:
            row = process(row, text)
        return SERVED.probabilities(row).astype(np.float64)

    first = after(prompt)
    second = sum(first[token] * after(np.append(prompt, token)) for token in np.flatnonzero(first))
    return np.stack([first, second])


def assert_drawn_from(counts, expected):
    """Total variation within what chance allows: a sum over tokens of binomial deviations, and half as much again."""
    draws = counts.sum()
    apart = 0.5 * np.abs(counts / draws - expected).sum()
    by_chance = 0.5 * np.sqrt(2 * expected * (1 - expected) / (np.pi * draws)).sum()
    assert apart < 1.5 * by_chance + 2 / np.sqrt(draws) / 2
    assert not counts[expected == 0].any()


@pytest.mark.parametrize("name", ["match", "rejection"])
def test_sampled_tokens_are_drawn_as_the_model_alone_draws_them(tiny_onnx, name):
    target, draft = runtime.load(tiny_onnx, threads=1), runtime.load(tiny_onnx, threads=1)
    prompt = np.random.default_rng(3).integers(3, 260, 6).astype(np.int64)
    expected = exact_marginals(target, prompt, (sharper,))
    assert (expected > 0).sum(axis=1).min() > 3
    drawn = Sampling(temperature=0.2) if name == "rejection" else None  # not what the target is sampled from
    acceptor = Rejection(SERVED) if drawn else SampleMatch(SERVED)
    drafter = DraftModel(draft, vocab=260, length=2, sampling=drawn)
    draws = 3000
    counts, kept = first_tokens(target, drafter, acceptor, prompt, draws, (sharper,))
    for place in range(2):
        assert_drawn_from(counts[place], expected[place])
    assert 0.05 * draws < kept < 0.95 * draws  # drafts were kept, and drafts were not


def test_the_histogram_test_can_fail(tiny_onnx):
    target, draft = runtime.load(tiny_onnx, threads=1), runtime.load(tiny_onnx, threads=1)
    prompt = np.random.default_rng(3).integers(3, 260, 6).astype(np.int64)
    expected = exact_marginals(target, prompt, (sharper,))
    drafter = DraftModel(draft, vocab=260, length=2)
    counts, _ = first_tokens(target, drafter, Typical(SERVED), prompt, 600, (sharper,))
    with pytest.raises(AssertionError):
        assert_drawn_from(counts[1], expected[1])


class Remembering:
    """A decoder that runs a text once, however often a simulation comes back to it."""

    runtime = "remembering"

    def __init__(self, decoder):
        self.decoder, self.vocab, self.max_tokens = decoder, decoder.vocab, decoder.max_tokens
        self.found, self.text, self.cached = {}, [], []

    def forward(self, tokens, position, rows=None):
        self.text = [*self.text[:position], *tokens.tolist()]
        key = (*self.text, rows)
        if key not in self.found:
            known = position if self.cached[:position] == self.text[:position] else 0
            self.found[key] = self.decoder.forward(np.array(self.text[known:]), known, rows)
            self.cached = self.text
        return self.found[key]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("acceptor", [SampleMatch(SERVED), Rejection(SERVED)], ids=["match", "rejection"])
def test_smollm2_is_sampled_as_it_samples_alone(smollm2, acceptor):
    target = Remembering(TorchDecoder(smollm2, dtype="float32"))
    text = "The capital of Italy is Rome. The capital of France is Paris. The capital of Italy is"
    prompt = np.array(Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(text).ids)
    expected = exact_marginals(target, prompt, ())
    draws = 10_000
    counts, kept = first_tokens(target, PromptLookup({2: 2, 1: 2}), acceptor, prompt, draws, ())
    for place in range(2):
        assert_drawn_from(counts[place], expected[place])
    assert kept > 0
