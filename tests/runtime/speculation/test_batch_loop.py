"""Several texts at once: each is what it would be alone, whatever the others do, and none waits without need."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.errors import UsageError
from optikit.runtime.speculation.acceptors import Greedy, Rejection, SampleMatch, Sampling, Typical
from optikit.runtime.speculation.batch_loop import generate_batch, write
from optikit.runtime.speculation.decoding_loop import Request, generate
from optikit.runtime.speculation.drafters import DraftModel, FirstOf, Medusa, NoDraft, PromptLookup
from optikit.runtime.speculation.logits_processors import RepetitionPenalty, StopStrings
from optikit.runtime.speculation.speculator import SpeculatingDecoder, Speculator
from tests.runtime.speculation.markov import MarkovBatch, MarkovDecoder, Scripted

SAMPLED = Sampling(temperature=0.8, top_p=0.95)


def right(text, limit, _rng):
    return list(MarkovDecoder().greedy(np.array(text), limit))


def sometimes(text, limit, rng):
    return [token if rng.random() < 0.6 else int(rng.integers(8)) for token in right(text, limit, rng)]


class Reused:
    """Heads that write their answers where the last ones were, as a bound session may."""

    def __init__(self):
        self.tokens, self.probs = np.empty(3, np.int64), np.ones(3, np.float32)

    def __call__(self, hidden, *_):
        self.tokens[:] = np.abs(hidden[:3] * 10).astype(np.int64) % 8
        return self.tokens, self.probs


HEADS = Reused()
DRAFTERS = {
    "silent": NoDraft,
    "right": lambda: Scripted(right),
    "sometimes": lambda: Scripted(sometimes),
    "lookup": lambda: PromptLookup({2: 4, 1: 2}),
    "draft": lambda: DraftModel(MarkovDecoder(seed=9), vocab=8, length=3),
    "drawn": lambda: DraftModel(MarkovDecoder(seed=9), vocab=8, length=3, sampling=SAMPLED, gate=0.3),
    "heads": lambda: Medusa(HEADS),
    "lookup-heads": lambda: FirstOf([PromptLookup({3: 6}), Medusa(HEADS)]),
}
ACCEPTORS = {
    "greedy": Greedy(),
    "match": SampleMatch(SAMPLED),
    "rejection": Rejection(SAMPLED),
    "typical": Typical(SAMPLED),
}

requests = st.builds(
    Request,
    max_new_tokens=st.integers(1, 24),
    eos=st.frozensets(st.integers(0, 7), max_size=2),
    stop=st.sampled_from([None, StopStrings(lambda tokens: "".join(map(str, tokens)), ("12", "304", "77"))]),
    processors=st.sampled_from([(), (RepetitionPenalty(1.3),), (RepetitionPenalty(0.7),)]),
    min_window=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
texts = st.tuples(st.lists(st.integers(0, 7), min_size=1, max_size=12), requests)


def together(prompts, wanted, drafters, acceptor=ACCEPTORS["greedy"], decoder=None):
    """Return the steps of every text, and the decoder that wrote them."""
    decoder = decoder or MarkovBatch(len(drafters))
    steps = [[] for _ in prompts]
    for number, step in generate_batch(decoder, drafters, acceptor, prompts, wanted):
        steps[number].append(step)
    return steps, decoder


@settings(max_examples=300)
@given(
    asked=st.lists(texts, min_size=1, max_size=7),
    names=st.lists(st.sampled_from(sorted(DRAFTERS)), min_size=1, max_size=4),
    acceptor=st.sampled_from(sorted(ACCEPTORS)),
)
def test_every_text_is_the_one_that_is_written_alone(asked, names, acceptor):
    """Ragged prompts, ends inside windows, penalties, own seeds, drafts kept here and refused there: step by step.

    All drafters are the same where the draft decides on the text: a drawn or lossy one.
    """
    if acceptor != "greedy":
        names = [names[0]] * len(names)
    prompts = [np.array(prompt) for prompt, _ in asked]
    wanted = [request for _, request in asked]
    steps, decoder = together(prompts, wanted, [DRAFTERS[name]() for name in names], ACCEPTORS[acceptor])
    for number, (prompt, request) in enumerate(zip(prompts, wanted, strict=True)):
        alone = list(generate(MarkovDecoder(), DRAFTERS[names[0]](), ACCEPTORS[acceptor], prompt, request))
        if len(set(names)) == 1:
            assert steps[number] == alone
        assert [t for step in steps[number] for t in step.tokens] == [t for step in alone for t in step.tokens]
        assert steps[number][-1].finish == alone[-1].finish
    assert max(map(len, decoder.forwards)) <= len(names)


def test_a_text_that_ends_makes_room_at_once():
    prompts = [np.array([1, i % 8]) for i in range(7)]
    wanted = [Request(max_new_tokens=3 + i % 3) for i in range(7)]
    steps, decoder = together(prompts, wanted, [NoDraft() for _ in range(3)])
    assert [sum(len(step.tokens) for step in each) for each in steps] == [3, 4, 5, 3, 4, 5, 3]
    after_prompts = [len(places) for places in decoder.forwards if len(places) > 1]
    full = [count for count in after_prompts if count == 3]
    assert len(full) >= len(after_prompts) - 3  # only at the very end is the batch not full
    assert sorted(decoder.forwards[-1]) == list(range(len(decoder.forwards[-1])))  # those left have closed up
    written = sum(len(each) - 1 for each in steps)
    assert len(decoder.forwards) < 7 + written  # forwards were shared


def test_the_last_texts_stand_side_by_side():
    """Places are given up from the front, in the middle and at the end; those that run are always 0, 1, …"""
    wanted = [Request(max_new_tokens=n) for n in (2, 9, 4, 12, 3)]
    prompts = [np.arange(1, 2 + i) for i in range(5)]
    steps, decoder = together(prompts, wanted, [PromptLookup({1: 2}) for _ in range(5)])
    for places in decoder.forwards[5:]:
        assert places == list(range(len(places)))
    for prompt, request, each in zip(prompts, wanted, steps, strict=True):
        alone = list(MarkovDecoder().greedy(prompt, request.max_new_tokens))
        assert [token for step in each for token in step.tokens] == alone


def test_fewer_prompts_than_places_and_none():
    steps, _ = together([np.array([1])], [Request(max_new_tokens=4)], [NoDraft() for _ in range(4)])
    assert len(steps[0]) == 4
    assert together([], [], [NoDraft()])[0] == []


@pytest.mark.parametrize(
    ("drafters", "prompts", "request_", "told"),
    [
        (0, [[1]], {"max_new_tokens": 3}, "0 texts at once don't fit: this decoder holds 2"),
        (3, [[1]], {"max_new_tokens": 3}, "3 texts at once don't fit"),
        (2, [[1], []], {"max_new_tokens": 3}, "the prompt is empty"),
        (2, [[1], [2]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (2, [[1], [2] * 20], {"max_new_tokens": 5}, "25 tokens don't fit"),
    ],
)
def test_requests_without_meaning_are_refused_before_anything_is_written(drafters, prompts, request_, told):
    decoder = MarkovBatch(2, max_tokens=24)
    wanted = [Request(**request_)] * len(prompts)
    with pytest.raises(UsageError, match=told):
        together([np.array(each, np.int64) for each in prompts], wanted, [NoDraft()] * drafters, decoder=decoder)
    assert decoder.forwards == []
    with pytest.raises(UsageError, match="1 prompts and 2 requests"):
        together([np.array([1])], [Request(max_new_tokens=1)] * 2, [NoDraft()], decoder=decoder)


class Holder(MarkovDecoder):
    """A decoder that can hold several texts, as those of `runtime.load`."""

    def batched(self, places):
        self.batch = MarkovBatch(places)
        return self.batch


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_loaded_decoder_writes_with_its_speculator(batch):
    decoder = Holder()
    speculating = SpeculatingDecoder(decoder, Speculator(method="lookup", lengths={2: 4, 1: 2}, min_window=2))
    prompts = [np.arange(1, 3 + i) for i in range(4)]
    for loaded in (decoder, speculating):
        texts = [[] for _ in prompts]
        for number, step in write(loaded, prompts, [Request(max_new_tokens=20)] * 4, batch=batch):
            texts[number] += step.tokens
        assert texts == [list(MarkovDecoder().greedy(prompt, 20)) for prompt in prompts]
    assert speculating.statistics.acceptance_length > 1.05
    if batch > 1:
        assert decoder.batch.places == min(batch, 4)
        assert min(min(each.windows) for each in decoder.batch.rows) == 2


class Drafting(MarkovDecoder):
    """A draft model that can be given another cache."""

    def sibling(self):
        return Drafting(seed=9)


def test_drafts_for_several_texts_have_a_cache_each():
    speculator = Speculator(method="draft", ahead=3, ahead_gate=0.0, draft=Drafting(seed=9))
    prompts = [np.arange(1, 3 + i) for i in range(4)]
    speculating = SpeculatingDecoder(Holder(), speculator)
    texts = [[] for _ in prompts]
    for number, step in write(speculating, prompts, [Request(max_new_tokens=20)] * 4, batch=3):
        texts[number] += step.tokens
    assert texts == [list(MarkovDecoder().greedy(prompt, 20)) for prompt in prompts]
    assert sum(speculating.statistics.drafted) > 20
    blind = SpeculatingDecoder(Holder(), replace(speculator, draft=MarkovDecoder(seed=9)))
    with pytest.raises(UsageError, match="writes ahead of one text at a time"):
        next(write(blind, prompts, [Request(max_new_tokens=2)] * 4, batch=2))
    with pytest.raises(UsageError, match="this toy decoder writes one text at a time"):
        next(write(MarkovDecoder(), prompts, [Request(max_new_tokens=2)] * 4, batch=2))


def test_numbers_that_are_none_stop_the_loop():
    decoder = MarkovBatch(2)
    decoder.rows[1].table[:] = np.nan
    prompts, wanted = [np.array([1]), np.array([2])], [Request(max_new_tokens=3)] * 2
    with pytest.raises(ValueError, match="largest logit is nan"):
        together(prompts, wanted, [NoDraft(), NoDraft()], decoder=decoder)
