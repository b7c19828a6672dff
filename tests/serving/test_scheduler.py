"""A queue of requests: each text is what it would be alone, a failure stays where it is, who leaves makes room."""

import threading
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.errors import LockedError, UsageError
from optikit.runtime.speculation.acceptors import Rejection, Sampling
from optikit.runtime.speculation.decoding_loop import Request
from optikit.runtime.speculation.logits_processors import Penalties, Recorder
from optikit.runtime.speculation.speculator import SpeculatingDecoder, Speculator
from optikit.serving.scheduler import Scheduler, Scores, Work, log_softmax, top
from tests.runtime.speculation.markov import MarkovBatch, MarkovDecoder


class Several(MarkovDecoder):
    """A decoder that can hold several texts."""

    def batched(self, places):
        self.batch = MarkovBatch(places)
        return self.batch


class Written:
    """Collects what a request is told."""

    def __init__(self):
        self.whole = Future()
        self.tokens, self.scores = [], None

    def __call__(self, told):
        if isinstance(told, Exception):
            self.whole.set_exception(told)
        elif isinstance(told, Scores):
            self.scores = told
        else:
            self.tokens += told.tokens
            if told.finish:
                self.whole.set_result(self.tokens)

    def text(self):
        return self.whole.result(20)


def ask(scheduler, prompt, count, **more):
    written = Written()
    request = Request(max_new_tokens=count, **more.pop("request", {}))
    number = scheduler.submit(Work(prompt=np.array(prompt), request=request, tell=written, **more))
    return number, written


def alone(prompt, count):
    return list(MarkovDecoder().greedy(np.array(prompt), count))


prompts = st.lists(st.tuples(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(1, 20)), max_size=12)


@settings(max_examples=25)
@given(asked=prompts, places=st.integers(1, 4), lookup=st.booleans())
def test_every_text_is_what_it_is_alone(asked, places, lookup):
    decoder = Several()
    if lookup:
        decoder = SpeculatingDecoder(decoder, Speculator(method="lookup", lengths={2: 3, 1: 2}))
    with Scheduler(decoder, places=places) as scheduler:
        written = [ask(scheduler, prompt, count)[1] for prompt, count in asked]
        assert [each.text() for each in written] == [alone(prompt, count) for prompt, count in asked]
        assert scheduler.running == scheduler.waiting == 0


def test_who_leaves_makes_room():
    decoder, gate = Several(), threading.Event()
    with Scheduler(decoder, places=1) as scheduler:
        seen = []

        def tell(told):
            seen.append(told)
            gate.wait(20)

        endless = scheduler.submit(Work(prompt=np.array([1]), request=Request(max_new_tokens=4000), tell=tell))
        waiting, never = ask(scheduler, [2], 5)
        _, last = ask(scheduler, [3], 5)
        scheduler.cancel(waiting)
        scheduler.cancel(endless)
        gate.set()
        assert last.text() == alone([3], 5)
        assert len(seen) <= 3
        assert never.tokens == []
        assert not never.whole.done()


def test_a_decoder_that_fails_fails_its_texts_and_goes_on():
    decoder = Several()
    with Scheduler(decoder, places=2) as scheduler:
        poisoned = decoder.batch.rows[0].table.copy()
        for row in decoder.batch.rows:
            row.table = np.full_like(row.table, np.nan)
        with pytest.raises(ValueError, match="largest logit"):
            ask(scheduler, [1, 2], 5)[1].text()
        for row in decoder.batch.rows:
            row.table = poisoned
        assert ask(scheduler, [1, 2], 5)[1].text() == alone([1, 2], 5)


def test_what_does_not_fit_is_refused_at_once():
    decoder = Several(max_tokens=16)
    with Scheduler(decoder, places=1, most_waiting=1) as scheduler:
        for prompt, count in (([1] * 10, 7), ([8], 1), ([], 1)):
            with pytest.raises(UsageError):
                ask(scheduler, prompt, count)


def test_a_full_queue_is_told():
    gate = threading.Event()
    with Scheduler(MarkovDecoder(), places=1, most_waiting=2) as scheduler:
        begun = threading.Event()

        def tell(_):
            begun.set()
            gate.wait(20)

        scheduler.submit(Work(prompt=np.array([1]), request=Request(max_new_tokens=9), tell=tell))
        assert begun.wait(20)
        waiting = [ask(scheduler, [2], 3)[1] for _ in range(2)]
        with pytest.raises(LockedError, match="2 requests wait"):
            ask(scheduler, [2], 3)
        gate.set()
        assert [each.text() for each in waiting] == [alone([2], 3)] * 2


@given(prompt=st.lists(st.integers(0, 7), min_size=1, max_size=150), best=st.integers(0, 8))
@settings(max_examples=20)
def test_scores_of_a_prompt(prompt, best):
    written = Written()
    done = threading.Event()

    def tell(told):
        written(told)
        done.set()

    with Scheduler(Several(), places=2) as scheduler:
        scheduler.submit(Work(prompt=np.array(prompt), request=None, tell=tell, scored=best))
        assert done.wait(20)
    model = MarkovDecoder()
    rows = np.array([model.row(prompt[: i + 1]) for i in range(len(prompt) - 1)]).reshape(-1, 8)
    wanted = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    assert written.scores.own == pytest.approx(wanted[np.arange(len(rows)), prompt[1:]], abs=1e-5)
    assert (written.scores.best == np.argsort(-rows, axis=1, kind="stable")[:, :best]).all()


def test_penalties_and_records_follow_the_text_within_a_window():
    """Frequencies are taken off as often as a token was written, also by drafts of the same window."""
    recorder = Recorder()
    penalties = Penalties(prompt=1, frequency=0.5, presence=0.25, bias={3: 7.0})
    logits = np.arange(8, dtype=np.float32)
    assert recorder(logits, np.array([1])) is logits
    changed = penalties(logits, np.array([5, 2, 2, 6]))  # the prompt's 5 doesn't count
    assert changed.tolist() == [0, 1, 2 - 1.25, 10, 4, 5, 6 - 0.75, 7]
    assert recorder.take(1).tolist() == [logits.tolist()]


def test_log_softmax_of_extremes():
    found = log_softmax(np.array([[1e4, -np.inf, 0.0]], np.float32))
    assert found.tolist() == [[0.0, -np.inf, -1e4]]
    assert top(found, 2).tolist() == [[0, 2]]
    with pytest.raises(ValueError, match="not numbers"):
        log_softmax(np.array([[np.nan, 0.0]], np.float32))


def test_draws_of_a_text_do_not_depend_on_the_others():
    sampled = {"acceptor": Rejection(Sampling(temperature=0.9))}
    texts = []
    for neighbours in (0, 5):
        with Scheduler(Several(), places=3) as scheduler:
            for seed in range(neighbours):
                ask(scheduler, [2], 15, request={"seed": 100 + seed}, **sampled)
            texts.append(ask(scheduler, [1], 20, request={"seed": 7}, **sampled)[1].text())
    assert texts[0] == texts[1]
