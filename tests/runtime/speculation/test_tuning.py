"""The choice of drafter and window: replays against the real loop, predictions against an exact clock."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.runtime.speculation.acceptors import Greedy
from optikit.runtime.speculation.cost_model import DraftCosts, WindowCosts, measure_windows
from optikit.runtime.speculation.decoding_loop import Request, Statistics, generate
from optikit.runtime.speculation.drafters import DraftModel, FirstOf, Medusa, NoDraft, PromptLookup
from optikit.runtime.speculation.speculator import Speculator
from optikit.runtime.speculation.tuning import Written, cache_drafts, predict, replay, tune, tune_with_datastore
from tests.runtime.speculation.markov import MarkovDecoder

FLAT = WindowCosts({1: 10.0, 32: 10.0})
STEEP = WindowCosts({1: 10.0, 2: 20.0, 32: 320.0})


class ClockedDecoder(MarkovDecoder):
    """Adds up what its forwards would cost."""

    def __init__(self, costs, **kwargs):
        super().__init__(**kwargs)
        self.costs = costs
        self.ms = 0.0

    def forward(self, tokens, position, rows=None):
        self.ms += self.costs.at(len(tokens))
        return super().forward(tokens, position, rows)


def run(drafter, prompt, count, decoder=None, min_window=1):
    request = Request(max_new_tokens=count, min_window=min_window)
    return list(generate(decoder or MarkovDecoder(), drafter, Greedy(), np.array(prompt, np.int64), request))


def written(prompt, count, **kwargs):
    decoder = MarkovDecoder(**kwargs)
    text = np.array(list(decoder.greedy(np.array(prompt), count)), np.int64)
    rows = [decoder.row([*prompt, *text[:i].tolist()]) for i in range(count)]
    return Written(np.array(prompt, np.int64), text, np.stack(rows) @ decoder.basis)


def heads(hidden, newest):
    return (np.abs(hidden[:3] * 10).astype(np.int64) + newest) % 8, np.full(3, 0.7, np.float32)


def knowing(hidden, newest):
    """Heads that are right whenever the newest token is: the state says which token came before it."""
    decoder = MarkovDecoder()
    far = np.abs(decoder.table - hidden @ np.linalg.inv(decoder.basis)).sum(-1)
    text = [int(far.argmin() % far.shape[1]), newest]
    for _ in range(3):
        text.append(int(decoder.row(text).argmax()))
    return np.array(text[2:]), np.full(3, 0.7, np.float32)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 50),
    name=st.sampled_from(["silent", "lookup", "draft", "medusa", "both"]),
)
def test_replays_take_the_steps_of_the_loop(seed, count, name):
    made = {
        "silent": NoDraft,
        "lookup": PromptLookup,
        "draft": lambda: DraftModel(MarkovDecoder(seed=7), vocab=8, length=3),
        "medusa": lambda: Medusa(heads, gate=0.4),
        "both": lambda: FirstOf([PromptLookup({2: 5}), Medusa(heads)]),
    }[name]
    prompt = np.random.default_rng(seed).integers(0, 8, 4).tolist()
    steps = run(made(), prompt, count)
    found = replay(made(), written(prompt, count))
    assert found == steps[1:]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_foreseen_is_what_heads_say_in_the_loop(seed):
    speculator = Speculator(method="medusa", ahead=3, ahead_gate=0.4, heads=knowing)
    prompt = np.random.default_rng(seed).integers(0, 8, 4).tolist()
    steps = run(speculator.drafter(), prompt, 40)
    told = cache_drafts(speculator, MarkovDecoder(), replace(written(prompt, 40), hidden=None))
    assert [step.accepted for step in steps[1:-1]] == [2] * (len(steps) - 2)
    assert replay(speculator.drafter(told.cached_drafts), told) == steps[1:]


@pytest.mark.parametrize("min_window", [1, 2])
def test_predictions_are_exact_where_the_clock_is(min_window):
    costs = WindowCosts({1: 4.0, 2: 5.5, 4: 6.5, 9: 11.0})
    prompt = [1, 2, 3]
    decoder = ClockedDecoder(costs)
    run(PromptLookup(), prompt, 60, decoder, min_window)
    decoding = decoder.ms - costs.at(len(prompt) + -len(prompt) % min_window)
    found = predict(replay(PromptLookup(), written(prompt, 60)), costs, min_window=min_window)
    assert found.ms_per_token * 59 == pytest.approx(decoding)
    assert found.speedup == pytest.approx(59 * costs.at(1) / decoding)


def test_drafting_time_is_part_of_the_price():
    steps = replay(PromptLookup(), written([1, 2, 3], 60))
    free, dear = predict(steps, FLAT), predict(steps, FLAT, drafting=DraftCosts(ask_ms=2.0, per_token_ms=1.0))
    counted = free.statistics
    extra = (2.0 * counted.steps + sum(counted.drafted)) / counted.tokens
    assert dear.ms_per_token == pytest.approx(free.ms_per_token + extra)
    assert predict([], FLAT).speedup == 1


LOOKUP = Speculator(method="lookup", lengths={3: 8, 2: 4})
QUIET = WindowCosts({1: 4.15, 2: 4.64, 3: 5.76, 4: 6.52, 5: 7.46, 6: 8.31, 9: 11.2})


def price(speculator, texts, costs):
    steps = [step for each in texts for step in replay(speculator.drafter(), each)]
    return predict(steps, costs, min_window=speculator.min_window).ms_per_token


def phrases(seed, count=4):
    """Texts that repeat a phrase of their own, and that use phrases which all of them know, each of them once."""
    rng, texts = np.random.default_rng(seed), []
    habits = np.random.default_rng(99).integers(0, 50, (15, 8))
    for _ in range(count):
        phrase = rng.integers(0, 50, 6)
        known = habits[rng.permutation(15)[:10]]
        tokens = np.concatenate([part for habit in known for part in (habit, phrase, rng.integers(0, 50, 2))])
        texts.append(Written(tokens[:20], tokens[20:]))
    return texts


def test_flat_costs_ask_for_long_drafts_and_steep_ones_for_none():
    texts = [written([seed % 8, 2], 80, seed=seed) for seed in range(6)]  # greedy texts of a small table soon loop
    eager = tune(LOOKUP, texts, FLAT)
    assert max(eager.lengths.values()) >= 8
    assert tune(LOOKUP, texts, STEEP).lengths == {}


def test_tuning_is_not_worse_than_where_it_began_nor_than_a_single_rule():
    texts = phrases(5)
    found = tune(LOOKUP, texts, QUIET)
    least = price(found, texts, QUIET)
    assert least <= price(LOOKUP, texts, QUIET)
    for n in (1, 2, 3):
        for k in (1, 2, 4, 8):
            assert least <= price(replace(LOOKUP, lengths={n: k}), texts, QUIET) * 1.02
    assert tune(replace(LOOKUP, min_window=2), texts, QUIET).min_window == 2


@pytest.mark.parametrize("remembered", [0, 12])
def test_habits_are_recalled_where_that_pays(remembered):
    texts, judged = phrases(5, 8), phrases(6, 8)
    found = tune_with_datastore(LOOKUP, phrases(7, remembered), texts, QUIET)
    assert found.datastore is not None
    assert price(found, judged, QUIET) < price(tune(LOOKUP, texts, QUIET), judged, QUIET) * 0.97
    everything = sum(len(each.text) for each in (*phrases(7, remembered), *texts))
    assert len(found.datastore.keys) > everything  # up to four n-grams end at each token


def test_nothing_is_recalled_from_noise():
    rng = np.random.default_rng(0)
    noise = [Written(rng.integers(0, 5000, 10), rng.integers(0, 5000, 60)) for _ in range(6)]
    found = tune_with_datastore(LOOKUP, noise[:2], noise[2:], QUIET)
    assert (found.lengths, found.datastore) == ({}, None)


def test_window_costs_are_measured_behind_the_context():
    class Slow(MarkovDecoder):
        def forward(self, tokens, position, rows=None):
            self.seen = [*getattr(self, "seen", []), (len(tokens), position)]
            return super().forward(tokens, position, rows)

    decoder = Slow(max_tokens=12)
    done = []
    context = np.array([1, 2, 3, 4])
    costs = measure_windows(decoder, context, rounds=3, observe=lambda *told: done.append(told))
    assert sorted(costs.ms) == [1, 2, 3, 4, 5, 6, 7, 8]  # 12 tokens of room, 4 of them taken
    assert decoder.seen[0] == (4, 0)
    assert {position for _, position in decoder.seen[1:]} == {4}
    assert len(decoder.seen) == 1 + 5 * 8
    assert done[-1] == (5, 5)
    assert all(ms > 0 for ms in costs.ms.values())


def test_measured_costs_follow_the_work():
    """A decoder that really works longer for more tokens: T rises, whatever else this machine does."""

    class Working(MarkovDecoder):
        def forward(self, tokens, position, rows=None):
            matrix = np.ones((300, 300), np.float32)
            for _ in range(20 * len(tokens)):
                matrix = np.clip(matrix @ matrix, 0, 1)
            return super().forward(tokens, position, rows)

    costs = measure_windows(Working(), np.array([1, 2]), windows=(1, 4, 8), rounds=5)
    assert costs.at(8) > costs.at(4) > costs.at(1)


def test_statistics_of_a_replay_are_the_loops():
    prompt = [3, 1, 2]
    found = predict(replay(PromptLookup(), written(prompt, 70)), FLAT).statistics
    expected = Statistics()
    for step in run(PromptLookup(), prompt, 70):
        expected.add(step)
    assert found == expected
