"""Acceptors against the distribution they promise: exact marginals and joints by simulation on a toy vocabulary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.errors import UsageError
from optikit.runtime.speculation import acceptors
from optikit.runtime.speculation.acceptors import Greedy, Rejection, SampleMatch, Sampling, Typical

VOCAB = 8


def random_logits(seed, rows=1, spread=1.5):
    return np.random.default_rng(seed).normal(0, spread, (rows, VOCAB)).astype(np.float32)


def chi2(counts, p):
    """Return χ² over its quantile 0.999 (Wilson and Hilferty's approximation): above 1 is a difference."""
    expected = p * counts.sum()
    seen = expected > 0
    assert counts[~seen].sum() == 0
    degrees = seen.sum() - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3
    return float(((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum() / limit)


def total_variation(counts, p):
    return 0.5 * float(np.abs(counts / counts.sum() - p).sum())


def first_two(acceptor, p_rows, q_rows, rng, *, drawn):
    """Return the first two tokens that a chain of two drafts writes; p depends on the first token."""
    first, second = p_rows
    x = acceptors.draw(q_rows[0], rng) if drawn else int(q_rows[0].argmax())
    y = acceptors.draw(q_rows[1][x], rng) if drawn else int(q_rows[1][x].argmax())
    draft = np.array([x, y])
    probs = np.stack([q_rows[0], q_rows[1][x]]) if drawn else None
    logits = np.stack([first, second[x], second[y]])
    accepted, token = acceptor.accept(draft, probs, logits, rng)
    if accepted == 0:
        rest = acceptors.draw(acceptor.sampling.probabilities(second[token]), rng)  # what the next step would write
        return token, rest
    return x, (token if accepted == 1 else y)


class Known(Sampling):
    """Remembers the distributions of the few rows that a simulation meets: most of its time would go there."""

    def probabilities(self, logits):
        found = self.__dict__.setdefault("found", {})
        key = logits.tobytes()
        if key not in found:
            found[key] = super().probabilities(logits)
        return found[key]


SERVED = Known(temperature=0.8, top_p=0.95)


@pytest.mark.parametrize("draws", [20_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("acceptor", "drawn"),
    [
        (SampleMatch(SERVED), False),
        (SampleMatch(SERVED), True),
        (Rejection(SERVED), True),
        (Rejection(SERVED), False),
        (Rejection(Known()), True),
    ],
    ids=["match-certain", "match-drawn", "rejection-drawn", "rejection-certain", "rejection-drawn-from-all"],
)
def test_two_tokens_have_the_targets_joint_distribution(acceptor, drawn, draws):
    rng = np.random.default_rng(1)
    first, second = random_logits(2)[0], random_logits(3, VOCAB)
    q_first = acceptor.sampling.probabilities(random_logits(4)[0])
    q_second = np.stack([acceptor.sampling.probabilities(row) for row in random_logits(5, VOCAB)])
    joint = np.zeros((VOCAB, VOCAB))
    for _ in range(draws):
        joint[first_two(acceptor, (first, second), (q_first, q_second), rng, drawn=drawn)] += 1
    p = acceptor.sampling.probabilities(first).astype(np.float64)
    expected = p[:, None] * np.stack([acceptor.sampling.probabilities(row) for row in second])
    expected /= expected.sum()
    assert chi2(joint.sum(axis=1), expected.sum(axis=1)) < 1
    assert chi2(joint, expected) < 1
    assert total_variation(joint, expected) < 2.5 / np.sqrt(draws)  # about half of that is chance


def test_a_lossy_acceptor_fails_the_same_test():
    """The distribution test can fail: typical acceptance follows the draft."""
    rng = np.random.default_rng(1)
    logits = random_logits(2, 2)
    q = Sampling().probabilities(random_logits(4)[0])
    counts = np.zeros(VOCAB)
    for _ in range(2000):
        x = acceptors.draw(q, rng)
        accepted, token = Typical(Sampling()).accept(np.array([x]), q[None], logits, rng)
        counts[x if accepted else token] += 1
    assert chi2(counts, Sampling().probabilities(logits[0])) > 5


def test_rejection_keeps_as_much_as_the_overlap_says_and_more_than_matching():
    rng = np.random.default_rng(7)
    logits = random_logits(8, 2)
    p = Sampling().probabilities(logits[0])
    q = Sampling().probabilities(logits[0] + random_logits(9, spread=0.5)[0])
    kept = {"rejection": 0, "match": 0}
    for _ in range(5000):
        draft = np.array([acceptors.draw(q, rng)])
        kept["rejection"] += Rejection(Sampling()).accept(draft, q[None], logits, rng).accepted
        kept["match"] += SampleMatch(Sampling()).accept(draft, None, logits, rng).accepted
    assert kept["rejection"] / 5000 == pytest.approx(acceptors.overlap(p, q), abs=0.025)
    assert kept["match"] / 5000 == pytest.approx(float((p * q).sum()), abs=0.025)
    assert kept["rejection"] > kept["match"]


def test_equal_distributions_keep_everything():
    rng = np.random.default_rng(0)
    logits = random_logits(1, 2)
    p = Sampling().probabilities(logits[0])
    for _ in range(2000):
        draft = np.array([acceptors.draw(p, rng)])
        assert Rejection(Sampling()).accept(draft, p[None], logits, rng).accepted == 1


def test_a_token_that_the_target_excludes_is_never_kept():
    logits = np.array([[0, -np.inf], [0, 0]], np.float32)
    for acceptor in (Rejection(Sampling()), SampleMatch(Sampling()), Typical(Sampling()), Greedy()):
        for seed in range(200):
            accepted, token = acceptor.accept(np.array([1]), None, logits, np.random.default_rng(seed))
            assert (accepted, token) == (0, 0)


def test_rejection_refuses_a_draft_that_contradicts_itself():
    q = np.array([[1, 0]], np.float32)
    with pytest.raises(ValueError, match="draft token 1 at position 0 has probability 0"):
        Rejection(Sampling()).accept(np.array([1]), q, np.zeros((2, 2), np.float32), np.random.default_rng(0))


def test_rejection_survives_a_residual_of_rounding_errors():
    p = Sampling().probabilities(np.zeros(3, np.float32))
    rest = acceptors._residual(p, 0, p * np.float32(1.0000001))
    assert rest is p


def test_greedy_keeps_the_matching_prefix():
    logits = np.eye(5, dtype=np.float32)[[3, 1, 4]]
    rng = np.random.default_rng(0)
    assert Greedy().accept(np.array([3, 1]), None, logits, rng) == (2, 4)
    assert Greedy().accept(np.array([3, 2]), None, logits, rng) == (1, 1)
    assert Greedy().accept(np.array([0, 1]), None, logits, rng) == (0, 3)
    assert Greedy().accept(np.array([], np.int64), None, logits[:1], rng) == (0, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("acceptor", [Greedy(), SampleMatch(Sampling()), Rejection(Sampling()), Typical(Sampling())])
def test_logits_that_are_no_numbers_are_refused(acceptor, bad):
    logits = np.full((1, 4), bad, np.float32)
    with pytest.raises(ValueError, match="largest logit"):
        acceptor.accept(np.array([], np.int64), None, logits, np.random.default_rng(0))


def slow_probabilities(logits, sampling):
    """The obvious way: sort everything, in float64."""
    scaled = logits.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled = np.where(scaled < np.sort(scaled)[-sampling.top_k], -np.inf, scaled)
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    keep = order[(before < sampling.top_p) | (np.arange(len(p)) == 0)]
    out = np.zeros_like(p)
    out[keep] = p[keep]
    return out / out.sum()


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 200),
    spread=st.floats(0.01, 8),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
)
def test_the_nucleus_equals_the_obvious_one(seed, size, spread, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found, expected = sampling.probabilities(logits), slow_probabilities(logits, sampling)
    differ = np.flatnonzero(((found > 0) != (expected > 0)) & (np.maximum(found, expected) > 1e-7))
    assert len(differ) <= 1  # rounding may put the last token of the nucleus on the other side of the border
    if not len(differ):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-7)
    assert found.sum() == pytest.approx(1, abs=1e-5)


def test_sampling_agrees_with_transformers():
    """Same set and same probabilities as the warpers that transformers applies, in its order."""
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed in range(50):
        logits = np.random.default_rng(seed).normal(0, 3, 300).astype(np.float32)
        scores = torch.from_numpy(logits)[None]
        for warp in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.9)):
            scores = warp(torch.zeros(1, 1, dtype=torch.long), scores)
        expected = scores.softmax(-1)[0].numpy()
        found = Sampling(temperature=0.7, top_k=40, top_p=0.9).probabilities(logits)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_drawing_never_takes_a_token_of_weight_zero():
    class Edge:
        def __init__(self, value):
            self.value = value

        def random(self):
            return self.value

    weights = np.array([0, 0.25, 0, 0.75, 0], np.float32)
    assert acceptors.draw(weights, Edge(0.0)) == 1
    assert acceptors.draw(weights, Edge(0.25)) == 3
    assert acceptors.draw(weights, Edge(1 - 2**-53)) == 3


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"temperature": 0}, "temperature 0"), ({"top_k": -1}, "top_k -1"), ({"top_p": 0}, "top_p 0")],
)
def test_sampling_refuses_what_cannot_be_sampled(settings, text):
    with pytest.raises(UsageError, match=text):
        Sampling(**settings)


def test_make_wants_leave_for_lossy_acceptors():
    assert acceptors.make("greedy") == Greedy()
    assert acceptors.make("rejection", Sampling(top_p=0.9)) == Rejection(Sampling(top_p=0.9))
    with pytest.raises(UsageError, match="typical is lossy"):
        acceptors.make("typical")
    assert acceptors.make("typical", allow_lossy=True) == Typical(Sampling())
    with pytest.raises(UsageError, match="no acceptor 'eagle'"):
        acceptors.make("eagle")
    with pytest.raises(UsageError, match="doesn't sample"):
        acceptors.make("greedy", Sampling())
    assert [name for name in acceptors.NAMES if acceptors.make(name, allow_lossy=True).lossless] == [
        "greedy",
        "sample_match",
        "rejection",
    ]
