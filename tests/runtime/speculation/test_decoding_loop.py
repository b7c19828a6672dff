"""The loop: the same text whatever the drafter says, ends where plain decoding ends, and the right distribution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.errors import UsageError
from optikit.runtime.speculation.acceptors import Greedy, Rejection, SampleMatch, Sampling, Typical
from optikit.runtime.speculation.decoding_loop import Request, Statistics, Step, generate
from optikit.runtime.speculation.drafters import DraftModel, FirstOf, Medusa, NoDraft, PromptLookup
from optikit.runtime.speculation.logits_processors import RepetitionPenalty, StopStrings
from tests.runtime.speculation.markov import MarkovDecoder, Scripted


def ids(*tokens):
    return np.array(tokens, np.int64)


def plain(prompt, count, **kwargs):
    return list(MarkovDecoder(**kwargs).greedy(ids(*prompt), count))


def write(drafter, prompt, *, decoder=None, acceptor=None, **request):
    decoder = decoder or MarkovDecoder()
    steps = list(generate(decoder, drafter, acceptor or Greedy(), ids(*prompt), Request(**request)))
    return [token for step in steps for token in step.tokens], steps


def right(text, limit, rng):
    return plain(text, limit)


def wrong(text, limit, rng):
    return [(token + 1) % 8 for token in plain(text, limit)]


def sometimes(text, limit, rng):
    return [token if rng.random() < 0.6 else int(rng.integers(8)) for token in plain(text, limit)]


DRAFTERS = {
    "silent": NoDraft,
    "right": lambda: Scripted(right),
    "wrong": lambda: Scripted(wrong),
    "random": lambda: Scripted(lambda _text, limit, rng: rng.integers(0, 8, min(limit, 5))),
    "sometimes": lambda: Scripted(sometimes),
    "one": lambda: Scripted(lambda text, _limit, rng: right(text, 1, rng)),
    "zero": lambda: Scripted(lambda _text, limit, _rng: [0] * limit),  # id 0 is padding to some implementations
    "lookup": PromptLookup,
    "draft": lambda: DraftModel(MarkovDecoder(seed=9), vocab=8, length=3),
    "itself": lambda: DraftModel(MarkovDecoder(), vocab=8, length=3),
    "heads": lambda: Medusa(
        lambda hidden, newest: ((np.abs(hidden[:3] * 10).astype(np.int64) + newest) % 8, np.ones(3, np.float32))
    ),
    "lookup-draft": lambda: FirstOf([PromptLookup({3: 6}), DraftModel(MarkovDecoder(seed=9), vocab=8, length=2)]),
}


@pytest.mark.parametrize("min_window", [1, 2])
@pytest.mark.parametrize("name", DRAFTERS)
def test_no_drafter_changes_the_greedy_text(name, min_window):
    for seed in range(12):
        prompt = np.random.default_rng(seed).integers(0, 8, 1 + seed % 5).tolist()
        decoder = MarkovDecoder()
        text, steps = write(DRAFTERS[name](), prompt, decoder=decoder, max_new_tokens=40, min_window=min_window)
        assert text == plain(prompt, 40)
        assert steps[-1].finish == "length"
        assert all(step.finish is None for step in steps[:-1])
        assert steps[0].by == "prompt"
        assert min(decoder.windows) >= min_window


def test_drafts_that_are_right_save_steps_and_others_do_not():
    _, steps = write(Scripted(lambda text, limit, rng: right(text, min(limit, 4), rng)), [1, 2], max_new_tokens=41)
    assert [len(step.tokens) for step in steps] == [1] + [5] * 8
    _, steps = write(DRAFTERS["wrong"](), [1, 2], max_new_tokens=40)
    assert len(steps) == 40


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(sorted(DRAFTERS)),
    eos=st.frozensets(st.integers(0, 7), max_size=3),
    budget=st.integers(1, 30),
    factor=st.sampled_from([None, 1.3, 0.7]),
    stop=st.sampled_from([(), ("12",), ("304", "77"), ("5",)]),
)
def test_the_text_ends_where_plain_decoding_ends(seed, name, eos, budget, factor, stop):
    """EOS, stop strings, penalties and the budget: as if every token had been written alone."""
    prompt = np.random.default_rng(seed).integers(0, 8, 3).tolist()
    request = {
        "max_new_tokens": budget,
        "eos": eos,
        "stop": StopStrings(lambda tokens: "".join(map(str, tokens)), stop) if stop else None,
        "processors": (RepetitionPenalty(factor),) if factor else (),
    }
    text, steps = write(DRAFTERS[name](), prompt, **request)
    expected, alone = write(NoDraft(), prompt, **request)
    assert text == expected
    assert steps[-1].finish == alone[-1].finish
    for step in steps:
        assert 0 <= step.accepted <= min(step.drafted, len(step.tokens))
        assert len(step.tokens) - step.accepted in ((0, 1) if step.finish else (1,))


def slow_plain(prompt, count, factor):
    """Penalized greedy decoding, written out."""
    decoder, text = MarkovDecoder(), list(prompt)
    for _ in range(count):
        row = decoder.row(text).copy()
        for token in set(text):
            row[token] = row[token] * factor if row[token] < 0 else row[token] / factor
        text.append(int(row.argmax()))
    return text[len(prompt) :]


def test_penalties_know_the_text_at_every_position():
    changed = 0
    for seed in range(10):
        prompt = np.random.default_rng(seed).integers(0, 8, 2).tolist()
        expected = slow_plain(prompt, 30, 1.5)
        changed += expected != plain(prompt, 30)
        for name in ("right", "random", "lookup", "draft"):
            text, _ = write(DRAFTERS[name](), prompt, max_new_tokens=30, processors=(RepetitionPenalty(1.5),))
            assert text == expected
    assert changed >= 3


def test_penalty_agrees_with_transformers():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)
    text = np.array([3, 7, 3, 49])
    expected = RepetitionPenaltyLogitsProcessor(1.2)(torch.from_numpy(text)[None], torch.from_numpy(logits)[None])
    np.testing.assert_allclose(RepetitionPenalty(1.2)(logits, text), expected[0].numpy(), rtol=1e-6)


def test_eos_inside_a_window_ends_the_text_and_nothing_after_it_counts():
    text = plain([1, 2], 40)
    eos = next(token for token in set(text) if 3 <= text.index(token) < 20)
    cut = text.index(eos) + 1
    written, steps = write(DRAFTERS["right"](), [1, 2], max_new_tokens=40, eos=frozenset({eos}))
    assert written == text[:cut]
    assert steps[-1].finish == "eos"
    assert sum(len(step.tokens) for step in steps) == cut
    assert steps[-1].accepted == len(steps[-1].tokens)
    assert steps[-1].drafted > steps[-1].accepted


def test_eos_as_the_very_first_token():
    first = plain([1, 2], 1)[0]
    text, steps = write(DRAFTERS["right"](), [1, 2], max_new_tokens=9, eos=frozenset({first}))
    assert (text, len(steps), steps[0].finish) == ([first], 1, "eos")


@pytest.mark.parametrize("min_window", [1, 2])
def test_the_context_may_be_filled_to_the_last_token(min_window):
    decoder = MarkovDecoder(max_tokens=24)
    text, _ = write(DRAFTERS["right"](), [1, 2, 3, 4], decoder=decoder, max_new_tokens=20, min_window=min_window)
    assert text == plain([1, 2, 3, 4], 20)
    with pytest.raises(UsageError, match="25 tokens don't fit"):
        write(NoDraft(), [1, 2, 3, 4], decoder=decoder, max_new_tokens=21)


def test_stop_strings_over_the_borders_of_tokens():
    stop = StopStrings(lambda tokens: "".join("ab€"[t % 3] for t in tokens), ["ba€"])
    assert stop([0, 1, 0, 2])
    assert not stop([0, 1, 0])
    assert not StopStrings(lambda _: "", [])([1, 2])
    with pytest.raises(UsageError, match="empty stop string"):
        StopStrings(str, ["a", ""])


def test_stop_strings_look_behind_tokens_without_text():
    stop = StopStrings(lambda tokens: "".join("x" * (t == 1) for t in tokens), ["xxx"])
    assert stop([1, *[0] * 50, 1, *[0] * 50, 1])
    assert not stop([1, *[0] * 200, 1])


@pytest.mark.parametrize(
    ("prompt", "request_", "text"),
    [
        ([], {"max_new_tokens": 4}, "the prompt is empty"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_requests_without_meaning_are_refused(prompt, request_, text):
    with pytest.raises(UsageError, match=text):
        write(NoDraft(), prompt, **request_)


def test_heads_need_a_decoder_that_shows_hidden_states():
    class Blind:
        runtime, vocab, max_tokens = "blind", 8, 99

    with pytest.raises(UsageError, match="blind decoder doesn't show them"):
        write(DRAFTERS["heads"](), [1], decoder=Blind(), max_new_tokens=4)


def test_heads_are_given_the_newest_token_and_the_state_that_predicted_it():
    decoder = MarkovDecoder()
    seen = []

    def heads(hidden, newest):
        seen.append((hidden, newest))
        return np.array([3, 1, 4]), np.ones(3, np.float32)

    text, steps = write(Medusa(heads), [1, 2], decoder=decoder, max_new_tokens=20)
    ends = np.cumsum([len(step.tokens) for step in steps])[: len(seen)]
    for end, (state, newest) in zip(ends, seen, strict=True):
        expected = MarkovDecoder().row([1, 2, *text[: end - 1]]) @ decoder.basis
        np.testing.assert_allclose(state, expected, rtol=1e-5)
        assert newest == text[end - 1]


def test_numbers_that_are_none_stop_the_loop():
    decoder = MarkovDecoder()
    decoder.table[:] = np.nan
    with pytest.raises(ValueError, match="largest logit is nan"):
        write(NoDraft(), [1], decoder=decoder, max_new_tokens=4)


@pytest.mark.parametrize(
    ("acceptor", "drafter"),
    [
        (SampleMatch(Sampling(temperature=0.8)), lambda: PromptLookup({1: 2})),
        (Rejection(Sampling(temperature=0.8)), lambda: PromptLookup({1: 2})),
        (
            Rejection(Sampling(temperature=0.8, top_p=0.95)),
            lambda: DraftModel(
                MarkovDecoder(vocab=4, seed=9), vocab=4, length=3, sampling=Sampling(temperature=0.8), gate=0.35
            ),
        ),
    ],
    ids=["match-lookup", "rejection-lookup", "rejection-gated-draft"],
)
def test_sampled_texts_have_the_models_own_distribution(acceptor, drafter):
    """All texts of three tokens, over the loop with everything in it; penalties included."""
    prompt, draws = [1, 2, 1], 12_000
    penalty = RepetitionPenalty(1.2)
    decoder = MarkovDecoder(vocab=4)
    counts = np.zeros((4, 4, 4))
    for seed in range(draws):
        request = Request(max_new_tokens=3, processors=(penalty,), seed=seed)
        steps = generate(decoder, drafter(), acceptor, ids(*prompt), request)
        counts[tuple(token for step in steps for token in step.tokens)] += 1
    expected = np.ones((4, 4, 4))
    for path in np.ndindex(4, 4, 4):
        for i in range(3):
            text = [*prompt, *path[:i]]
            p = acceptor.sampling.probabilities(penalty(decoder.row(text), np.array(text)))
            expected[path] *= p[path[i]]
    assert 0.5 * np.abs(counts / draws - expected).sum() < 0.045  # 64 texts, 12,000 draws: about 0.03 by chance
    likely = expected * draws >= 5
    z = (counts - expected * draws)[likely] / np.sqrt(expected * draws * (1 - expected))[likely]
    assert np.abs(z).max() < 4.5


def test_the_same_seed_draws_the_same_text():
    def text(seed):
        return write(PromptLookup(), [1, 2], acceptor=SampleMatch(Sampling()), max_new_tokens=30, seed=seed)[0]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_lossy_acceptor_may_change_the_text():
    text, _ = write(DRAFTERS["sometimes"](), [1, 2], acceptor=Typical(Sampling()), max_new_tokens=40)
    assert text != plain([1, 2], 40)


def test_statistics_count_what_was_drafted_and_kept():
    found = Statistics()
    for step in (
        Step((5,), 0, 0, "prompt", None),
        Step((1, 2, 3), 4, 2, "lookup", None),
        Step((1,), 1, 0, "medusa", None),
        Step((1,), 0, 0, "", None),
        Step((1, 2), 3, 2, "lookup", "eos"),
    ):
        found.add(step)
    assert (found.steps, found.tokens) == (4, 7)
    assert found.drafted == [3, 2, 2, 1]
    assert found.accepted == [2, 2, 0, 0]
    assert found.acceptance_length == 2.0
    assert found.acceptance_by_position == (0.5, 0.5, 0, 0)
    assert found.by == {"lookup": (2, 7, 4), "medusa": (1, 1, 0)}
    assert Statistics().acceptance_length == 1


def test_statistics_agree_with_the_windows_that_were_run():
    decoder = MarkovDecoder()
    text, steps = write(DRAFTERS["sometimes"](), [1, 2], decoder=decoder, max_new_tokens=60)
    found = Statistics()
    for step in steps:
        found.add(step)
    assert found.tokens == len(text) - 1
    assert found.steps == len(decoder.windows) - 1
    assert sum(found.drafted) + found.steps == sum(decoder.windows[1:])
    assert found.acceptance_length == pytest.approx(found.tokens / found.steps)
