"""`Scheduler`: requests of many callers through one decoder, as many at once as it has places.

    with Scheduler(decoder, places=8) as scheduler:
        number = scheduler.submit(Work(prompt=tokens, request=Request(max_new_tokens=64), tell=print))

One thread runs the decoder. A request waits for a place, is told every step of its text, and leaves when it is whole,
when it is cancelled, or when the decoder fails; its place is taken by the next one at once. Each text is what it would
be alone (see `batch_loop`).
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, cast

import numpy as np
from numpy.typing import NDArray

from optikit.errors import LockedError
from optikit.runtime.decoder import BatchDecoder, Decoder, Logits, Tokens, Window
from optikit.runtime.decoders.checks import check_call
from optikit.runtime.speculation.acceptors import Acceptor, Greedy
from optikit.runtime.speculation.batch_loop import Texts
from optikit.runtime.speculation.decoding_loop import (
    FeatureDecoder,
    HiddenDecoder,
    Request,
    Statistics,
    Step,
    check,
)
from optikit.runtime.speculation.drafters import Features, Hidden
from optikit.runtime.speculation.speculator import SpeculatingDecoder, Speculator

SCORED_AT_ONCE = 64
"""Positions of a prompt whose logits are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of a prompt's tokens, nats.

    Attributes:
        own: (n - 1,): of each token but the first.
        best: (n - 1, k): the k likeliest tokens in the place of each, likeliest first.
        best_own: (n - 1, k): theirs.
    """

    own: NDArray[np.float64]
    best: NDArray[np.int64]
    best_own: NDArray[np.float64]


Told = Step | Scores | Exception
"""What a request is told: scores of its prompt if wanted, then steps until one has `finish`, or a failure."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One text to write.

    Attributes:
        prompt: (n,) token ids, n ≥ 1.
        request: What to write after it; None only scores the prompt.
        tell: Called by the scheduler's thread; it must be quick and may not raise.
        acceptor: Decides on drafts.
        scored: How many likeliest tokens are told with the scores of the prompt; None doesn't score it.
    """

    prompt: Tokens
    request: Request | None
    tell: Callable[[Told], None]
    acceptor: Acceptor = field(default_factory=Greedy)
    scored: int | None = None


class OnePlace:
    """A decoder of one text as one of several; see `decoder.BatchDecoder`."""

    places = 1

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.runtime, self.vocab, self.max_tokens = decoder.runtime, decoder.vocab, decoder.max_tokens

    def forward(self, windows: Sequence[Window]) -> list[Logits]:
        """Run the only window; see `decoder.BatchDecoder.forward`."""
        return [self._decoder.forward(each.tokens, each.position, each.rows) for each in windows]

    def hidden(self, _window: int, row: int) -> Hidden:
        """Return what the head read; see `decoding_loop.HiddenDecoder`."""
        return cast("HiddenDecoder", self._decoder).hidden(row)

    def features(self, _window: int) -> Features:
        """Return what shown blocks were given; see `decoding_loop.FeatureDecoder`."""
        return cast("FeatureDecoder", self._decoder).features()

    def move(self, _source: int, _target: int) -> None:
        """Do nothing: there is nowhere to go."""


class Scheduler:
    """A queue before a decoder, and the thread that empties it.

    Args:
        decoder: What `runtime.load` returned; nobody else may use it.
        places: Texts written at once; a decoder that can't hold several is asked for one.
        most_waiting: Requests that may wait for a place.

    Attributes:
        target: The decoder without its speculator.
        speculator: What drafts.
        statistics: Of all texts so far.
    """

    def __init__(self, decoder: Decoder, *, places: int = 1, most_waiting: int = 64) -> None:
        self.target, self.speculator, self.statistics = decoder, Speculator(method="off"), Statistics()
        if isinstance(decoder, SpeculatingDecoder):
            self.target, self.speculator = decoder.target, decoder.speculator
        several = getattr(self.target, "batched", None) if places > 1 else None
        self._decoder: BatchDecoder = OnePlace(self.target) if several is None else several(places)
        self._texts = Texts(self._decoder, self.speculator.drafters(self._decoder.places))
        self._checked_by = self.speculator.drafter()
        self._most_waiting = most_waiting
        self._numbers = itertools.count()
        self._waiting: OrderedDict[int, Work] = OrderedDict()
        self._running: dict[int, Work] = {}
        self._gone: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def places(self) -> int:
        """Texts that are written at once at most."""
        return self._decoder.places

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return len(self._running)

    def submit(self, work: Work) -> int:
        """Put a text in the queue; return the number by which it can be cancelled.

        Raises:
            UsageError: It doesn't fit, or has tokens that the model doesn't know; see `decoding_loop.check`.
            LockedError: Too many wait already.
        """
        check(self.target, self._checked_by, work.prompt, work.request or Request(max_new_tokens=1))
        check_call(work.prompt, 0, filled=0, vocab=self.target.vocab, max_tokens=self.target.max_tokens)
        if work.request is not None and self.speculator.min_window == 2:
            work = replace(work, request=replace(work.request, min_window=2))
        with self._changed:
            if len(self._waiting) >= self._most_waiting:
                message = f"{len(self._waiting)} requests wait already"
                raise LockedError(message, fix="try again later, or let more wait with --queue")
            number = next(self._numbers)
            self._waiting[number] = work
            self._changed.notify()
        return number

    def cancel(self, number: int) -> None:
        """End a text that nobody reads any more; it is told nothing from then on but what is on its way."""
        with self._changed:
            if self._waiting.pop(number, None) is None:
                self._gone.add(number)
                self._changed.notify()

    def _work(self) -> None:
        while self._admit():
            for number, told in self._advance():
                work = self._running.get(number)
                if work is None:
                    continue
                if isinstance(told, Step):
                    self.statistics.add(told)
                if isinstance(told, Exception) or (isinstance(told, Step) and told.finish):
                    del self._running[number]
                work.tell(told)

    def _admit(self) -> bool:
        """Wait for something to do; drop who is gone and let in who waits. Return False when it is over."""
        with self._changed:
            while not (self._closed or self._waiting or self._running):
                self._gone.clear()
                self._changed.wait()
            gone, self._gone = self._gone, set()
            entering: list[tuple[int, Work]] = []
            free = self._texts.free + len(gone & self._running.keys())
            while self._waiting and len(entering) < free:
                entering.append(self._waiting.popitem(last=False))
        for number in gone:
            self._texts.drop(number)
            self._running.pop(number, None)
        for number, work in entering:
            self._begin(number, work)
        return not self._closed

    def _begin(self, number: int, work: Work) -> None:
        """Score a prompt if that is wanted, and give its text a place."""
        try:
            if work.scored is not None:
                work.tell(score(self._decoder, len(self._texts.numbers), work.prompt, work.scored))
            if work.request is not None:
                self._texts.begin(number, work.acceptor, work.prompt, work.request)
                self._running[number] = work
        except Exception as error:  # noqa: BLE001 - a text fails alone, and is told
            work.tell(error)

    def _advance(self) -> Sequence[tuple[int, Told]]:
        """Return what the next forward brings; where it fails, all texts that are being written end with it."""
        try:
            return self._texts.step() if self._running else []
        except Exception as error:  # noqa: BLE001 - as above
            running = list(self._running)
            for number in running:
                self._texts.drop(number)
            return [(number, error) for number in running]


def score(decoder: BatchDecoder, place: int, prompt: Tokens, best: int) -> Scores:
    """Return the log-probabilities of a prompt's tokens.

    Args:
        decoder: The model.
        place: One whose text is over.
        prompt: (n,) token ids, n ≥ 1.
        best: How many likeliest tokens to tell beside each, 0 for none.

    Raises:
        ValueError: The logits aren't numbers.
    """
    own, tokens, theirs = [np.empty(0)], [np.empty((0, best), np.int64)], [np.empty((0, best))]
    for start in range(0, len(prompt) - 1, SCORED_AT_ONCE):
        asked = prompt[start : min(start + SCORED_AT_ONCE, len(prompt) - 1)]
        logits = decoder.forward([Window(place, asked, start, len(asked))])[0]
        logprobs = log_softmax(logits)
        rows = np.arange(len(asked))
        own.append(logprobs[rows, prompt[start + 1 : start + 1 + len(asked)]])
        likeliest = top(logprobs, best)
        tokens.append(likeliest)
        theirs.append(np.take_along_axis(logprobs, likeliest, axis=1))
    return Scores(own=np.concatenate(own), best=np.concatenate(tokens), best_own=np.concatenate(theirs))


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Return log-probabilities (rows, vocab), nats.

    Raises:
        ValueError: The logits aren't numbers.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    if np.isnan(found).any():
        raise ValueError("the logits of the model are not numbers")
    return found


def top(logprobs: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return the likeliest tokens (rows, count) of each row, likeliest first; of equals the one of the lower number."""
    if count == 0:
        return np.empty((len(logprobs), 0), np.int64)
    found: NDArray[np.int64] = np.argsort(-logprobs, axis=1, kind="stable")[:, :count]
    return found
