"""Drafters: lookup against the obvious search, a draft model against running it afresh, heads and their gate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.errors import UsageError
from optikit.runtime.speculation.acceptors import Sampling
from optikit.runtime.speculation.drafters import EMPTY, DraftModel, FirstOf, Medusa, NoDraft, PromptLookup
from tests.runtime.speculation.markov import MarkovDecoder, Scripted

RNG = np.random.default_rng(0)


def ids(*tokens):
    return np.array(tokens, np.int64)


def slow_lookup(text, lengths, limit):
    """Search the whole text backwards for the longest suffix, then copy what follows, over the end as a loop."""
    for n in sorted(lengths, reverse=True):
        suffix = text[-n:]
        for start in range(len(text) - n - 1, -1, -1):
            if len(suffix) == n and text[start : start + n] == suffix:
                grown = list(text)
                for i in range(min(limit, lengths[n])):
                    grown.append(grown[start + n + i])
                return grown[len(text) :]
    return []


@settings(max_examples=300)
@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    pieces=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=6),
    lengths=st.dictionaries(st.integers(1, 5), st.integers(1, 9), min_size=1, max_size=3),
    limit=st.integers(1, 10),
)
def test_lookup_equals_the_obvious_search(prompt, pieces, lengths, limit):
    lookup = PromptLookup(lengths)
    lookup.start(ids(9, 9, 9))  # of a text before, forgotten
    lookup.start(ids(*prompt))
    text = list(prompt)
    for piece in pieces:
        assert lookup.draft(limit, RNG).tokens.tolist() == slow_lookup(text, lengths, limit)
        lookup.extend(ids(*piece), None)
        text += piece
    assert lookup.draft(limit, RNG).tokens.tolist() == slow_lookup(text, lengths, limit)


def test_lookup_prefers_the_longest_and_then_the_latest_match():
    lookup = PromptLookup({3: 2, 1: 2})
    lookup.start(ids(1, 2, 3, 10, 11, 3, 20, 21, 1, 2, 3))
    assert lookup.draft(8, RNG).tokens.tolist() == [10, 11]
    lookup.start(ids(3, 10, 3, 20, 3))
    assert lookup.draft(8, RNG).tokens.tolist() == [20, 3]


def test_lookup_continues_a_loop():
    lookup = PromptLookup({2: 7})
    lookup.start(ids(1, 2, 3, 1, 2))
    assert lookup.draft(8, RNG).tokens.tolist() == [3, 1, 2, 3, 1, 2, 3]


def test_lookup_has_nothing_to_say_about_new_words():
    lookup = PromptLookup()
    lookup.start(ids(1))
    assert lookup.draft(8, RNG) is EMPTY
    lookup.extend(ids(2, 3, 4), None)
    assert lookup.draft(8, RNG) is EMPTY


def test_noting_a_token_does_not_take_longer_in_a_long_text():
    """Work per token is counted, not timed: entries of the index grow by at most one per length of match."""
    lookup = PromptLookup({3: 8, 2: 4})
    lookup.start(np.random.default_rng(0).integers(0, 500, 20_000))
    entries = sum(map(len, lookup._followed.values()))
    lookup.extend(ids(1), None)
    assert sum(map(len, lookup._followed.values())) <= entries + 2


@pytest.mark.parametrize("lengths", [{}, {0: 4}, {2: 0}, {3: -1, 2: 4}])
def test_lookup_refuses_lengths_without_meaning(lengths):
    with pytest.raises(UsageError, match="lookup lengths"):
        PromptLookup(lengths)


def test_a_draft_model_writes_what_it_would_write_alone():
    decoder = MarkovDecoder(seed=3)
    drafter = DraftModel(decoder, vocab=8, length=5)
    drafter.start(ids(1, 2, 3))
    assert drafter.draft(8, RNG).tokens.tolist() == list(MarkovDecoder(seed=3).greedy(ids(1, 2, 3), 5))
    assert drafter.draft(2, RNG).tokens.tolist() == list(MarkovDecoder(seed=3).greedy(ids(1, 2, 3), 2))


@settings(max_examples=200)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7)), max_size=12),
    length=st.integers(1, 6),
)
def test_a_draft_model_keeps_only_what_became_text(pieces, length):
    """Whatever part of each draft is accepted: its cache holds the text, and it never runs a token twice."""
    decoder = MarkovDecoder(seed=5)
    drafter = DraftModel(decoder, vocab=8, length=length)
    text = [1, 2]
    drafter.start(ids(*text))
    for accepted, token in pieces:
        draft = drafter.draft(8, RNG).tokens
        assert draft.tolist() == list(MarkovDecoder(seed=5).greedy(ids(*text), length))
        new = [*draft[:accepted].tolist(), token]
        text += new
        drafter.extend(ids(*new), None)
        assert drafter._cached == text[: len(drafter._cached)]
    run = sum(decoder.windows)
    assert run <= len(text) + len(pieces) * length


def test_a_draft_model_stops_at_the_end_of_its_context():
    drafter = DraftModel(MarkovDecoder(max_tokens=6), vocab=8, length=4)
    drafter.start(ids(1, 2, 3, 4))
    assert len(drafter.draft(8, RNG).tokens) == 3
    drafter.extend(ids(1, 2), None)
    assert len(drafter.draft(8, RNG).tokens) == 1
    drafter.extend(ids(1), None)
    assert drafter.draft(8, RNG) is EMPTY


def test_a_draft_model_says_what_it_drew_from():
    sampling = Sampling(temperature=0.7, top_p=0.9)
    decoder = MarkovDecoder(seed=3)
    drafter = DraftModel(decoder, vocab=8, length=3, sampling=sampling)
    drafter.start(ids(1, 2))
    draft = drafter.draft(8, np.random.default_rng(4))
    text = [1, 2]
    for token, probs in zip(draft.tokens, draft.probs, strict=True):
        np.testing.assert_array_equal(probs, sampling.probabilities(decoder.row(text)))
        text.append(int(token))


def test_the_gate_of_a_draft_model_looks_at_the_likeliest_tokens_only():
    """The decision to go on is made before the draw: a gate on drawn tokens would change what is drawn."""
    decoder = MarkovDecoder(seed=3)
    for seed in range(50):
        drafter = DraftModel(decoder, vocab=8, length=6, sampling=Sampling(), gate=0.4)
        drafter.start(ids(1, 2))
        draft = drafter.draft(8, np.random.default_rng(seed)).tokens.tolist()
        tops = [Sampling().probabilities(decoder.row([1, 2, *draft[:i]])).max() for i in range(len(draft) + 1)]
        sure = np.cumprod(tops)
        assert all(each >= 0.4 for each in sure[: len(draft)])
        assert len(draft) == 6 or sure[-1] < 0.4


def test_a_draft_of_another_vocabulary_is_refused():
    with pytest.raises(UsageError, match="vocabulary of 8 tokens, the model one of 9"):
        DraftModel(MarkovDecoder(vocab=8), vocab=9)


def test_heads_draft_as_far_as_they_are_sure():
    state = np.ones(4, np.float32)
    seen = []

    def heads(hidden, newest):
        seen.append((hidden, newest))
        return ids(5, 6, 7), np.array([0.9, 0.8, 0.5], np.float32)

    drafter = Medusa(heads, gate=0.5)
    drafter.start(ids(1))
    assert drafter.draft(3, RNG) is EMPTY
    drafter.extend(ids(2, 4), state)
    assert drafter.draft(8, RNG).tokens.tolist() == [5, 6]
    assert seen[0][0] is state
    assert seen[0][1] == 4
    assert drafter.draft(1, RNG).tokens.tolist() == [5]
    assert Medusa(heads, gate=0.95).reads_hidden
    sure = Medusa(heads, gate=0.95)
    sure.extend(ids(2), state)
    assert sure.draft(8, RNG) is EMPTY


def test_the_first_drafter_with_an_answer_is_taken():
    lookup, other = PromptLookup({2: 2}), Scripted(lambda text, _limit, _rng: [len(text)])
    both = FirstOf([lookup, other])
    both.start(ids(1, 2, 3))
    assert both.draft(4, RNG).by == "scripted"
    both.extend(ids(1, 2), None)
    draft = both.draft(4, RNG)
    assert (draft.by, draft.tokens.tolist()) == ("lookup", [3, 1])
    assert not both.reads_hidden
    assert FirstOf([lookup, Medusa(lambda _state, _newest: (ids(), ids()))]).reads_hidden
    assert FirstOf([NoDraft(), NoDraft()]).draft(4, RNG) is EMPTY
