"""From what a request says to texts in pieces: sampling, stop strings, log-probabilities, all choices in one stream."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from optikit.runtime.decoder import Tokens
from optikit.runtime.speculation import acceptors
from optikit.runtime.speculation.acceptors import Acceptor, Sampling
from optikit.runtime.speculation.decoding_loop import Request, Step
from optikit.runtime.speculation.logits_processors import (
    Penalties,
    Processor,
    Recorder,
    RepetitionPenalty,
    StopStrings,
)
from optikit.serving.scheduler import Scheduler, Scores, Told, Work, log_softmax, top

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from optikit.serving.openai_api import Sampled

PREFIX = 6
"""Tokens of a prompt that a decoder of text is told, so that an answer begins with its space where it has one."""
Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Rated:
    """A token with its log-probability, nats, and the likeliest ones in its place; None of the first of a prompt."""

    token: int
    logprob: float | None
    best: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step adds to a choice.

    Attributes:
        choice: Which text, from 0.
        text: New text; may be empty while a character or a stop string may be incomplete.
        tokens: New tokens, the one that ended the text among them.
        rated: As many, where log-probabilities are wanted.
        prompt: Those of the prompt's tokens, with the first piece of a choice that echoes it.
        finish: Why the text ends here, if it does.
        drafted, accepted: Tokens of a speculator.
    """

    choice: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    rated: tuple[Rated, ...] = ()
    prompt: tuple[Rated, ...] = ()
    finish: Finish | None = None
    drafted: int = 0
    accepted: int = 0


def joined(pieces: Sequence[Piece]) -> Piece:
    """Return pieces of one choice, at least one, as one."""
    return Piece(
        choice=pieces[0].choice,
        text="".join(each.text for each in pieces),
        tokens=tuple(token for each in pieces for token in each.tokens),
        rated=tuple(rated for each in pieces for rated in each.rated),
        prompt=tuple(rated for each in pieces for rated in each.prompt),
        finish=pieces[-1].finish,
        drafted=sum(each.drafted for each in pieces),
        accepted=sum(each.accepted for each in pieces),
    )


Came = tuple[Told, tuple[Rated, ...]]
"""What a choice is told, with the log-probabilities of new tokens."""


class TextBuffer:
    """Text of tokens, held back while it may be the beginning of a stop string, and cut before one.

    Args:
        by: The tokenizer.
        before: The last tokens of what the text follows, () where it begins anew.
        stops: Strings that end it.
    """

    def __init__(self, by: Tokenizer, before: Sequence[int], stops: Sequence[str]) -> None:
        self._by, self._stops = by, tuple(stops)
        self._decoded = DecodeStream(ids=list(before), skip_special_tokens=True)
        self._held = ""
        self._over = False

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the text that is sure by now."""
        for token in tokens:
            self._held += self._decoded.step(self._by, token) or ""
        found = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if found >= 0 or self._over:
            text = "" if self._over else self._held[:found]
            self._held, self._over = "", True
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def rest(self) -> str:
        """Return what was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that is a beginning of a stop string, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class _Choice:
    """One text while it comes: `tell` in the scheduler's thread, `piece` in the server's.

    Args:
        number: Which, from 0.
        prompt: (n,) token ids.
        asked: What the client said.
        by: The tokenizer.
        ends: Tokens that end a text.
        anew: The answer doesn't go on with the prompt's text.
    """

    def __init__(
        self, number: int, prompt: Tokens, asked: Sampled, by: Tokenizer, ends: frozenset[int], *, anew: bool
    ) -> None:
        self._number, self._prompt, self._asked, self._by = number, prompt, asked, by
        self._ends = frozenset() if asked.ignore_eos else ends
        self._buffer = TextBuffer(by, () if anew else prompt[-PREFIX:].tolist(), asked.stop)
        self._recorder = Recorder() if asked.told is not None else None

    def work(
        self, room: int, tell: Callable[[Told, tuple[Rated, ...]], None], *, echo: bool, acceptor: str = "greedy"
    ) -> Work:
        """Return what the scheduler is to do.

        Args:
            room: Tokens that fit behind the prompt.
            tell: Told what comes, with the log-probabilities of new tokens.
            echo: Those of the prompt are wanted.
            acceptor: What decides on drafts, as the recipe says.
        """
        asked = self._asked
        wanted = asked.new_tokens if asked.new_tokens is not None else max(1, room)
        request = Request(
            max_new_tokens=wanted,
            eos=self._ends,
            stop=StopStrings(self._decode, asked.stop) if asked.stop else None,
            processors=tuple(self._processors()),
            seed=_seed(asked.seed, self._number),
        )
        return Work(
            prompt=self._prompt,
            request=request if wanted else None,
            acceptor=_acceptor(asked, acceptor),
            scored=asked.told if echo else None,
            tell=lambda told: tell(told, self._rate(told)),
        )

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._by.decode(tokens, skip_special_tokens=True)
        return text

    def _processors(self) -> Iterator[Processor]:
        asked = self._asked
        if self._recorder is not None:
            yield self._recorder
        if asked.repetition_penalty != 1:
            yield RepetitionPenalty(asked.repetition_penalty)
        if asked.frequency_penalty or asked.presence_penalty or asked.logit_bias:
            yield Penalties(
                prompt=len(self._prompt),
                frequency=asked.frequency_penalty,
                presence=asked.presence_penalty,
                bias=asked.logit_bias,
            )

    def _rate(self, told: Told) -> tuple[Rated, ...]:
        """Return the log-probabilities of what came, by the model's own logits, before penalties and temperature."""
        if isinstance(told, Scores):
            first = Rated(token=int(self._prompt[0]), logprob=None)
            return (first, *_rated(self._prompt[1:], told.own, told.best, told.best_own))
        if self._recorder is None or not isinstance(told, Step):
            return ()
        logprobs = log_softmax(self._recorder.take(len(told.tokens)))
        best = top(logprobs, self._asked.told or 0)
        own = logprobs[np.arange(len(told.tokens)), told.tokens]
        return tuple(_rated(np.array(told.tokens), own, best, np.take_along_axis(logprobs, best, axis=1)))

    def piece(self, came: Sequence[Came]) -> Piece:
        """Return what came as one piece of text.

        Raises:
            Exception: It is a failure.
        """
        return joined([self._piece(told, rated) for told, rated in came])

    def _piece(self, told: Told, rated: tuple[Rated, ...]) -> Piece:
        if isinstance(told, Exception):
            raise told
        if isinstance(told, Scores):
            over: Finish | None = "length" if self._asked.new_tokens == 0 else None
            return Piece(choice=self._number, prompt=rated, finish=over)
        ended = told.finish == "eos"
        text = self._buffer.feed(told.tokens[:-1] if ended else told.tokens)
        if told.finish:
            text += self._buffer.rest()
        return Piece(
            choice=self._number,
            text=text,
            tokens=told.tokens,
            rated=rated,
            finish=("length" if told.finish == "length" else "stop") if told.finish else None,
            drafted=told.drafted,
            accepted=told.accepted,
        )


def _rated(
    tokens: Tokens, own: NDArray[np.float64], best: NDArray[np.int64], theirs: NDArray[np.float64]
) -> Iterator[Rated]:
    for token, logprob, likeliest, logprobs in zip(tokens, own, best, theirs, strict=True):
        pairs = tuple(zip(likeliest.tolist(), logprobs.tolist(), strict=True))
        yield Rated(token=int(token), logprob=float(logprob), best=pairs)


def _seed(seed: int | None, choice: int) -> int:
    """Return the seed of a choice: as asked, so that a request can be repeated, else another one every time."""
    if seed is None:
        return secrets.randbits(63)
    return int(np.random.SeedSequence([seed & (2**64 - 1), choice]).generate_state(1, np.uint64)[0])


def _acceptor(asked: Sampled, name: str) -> Acceptor:
    """Return the acceptor that the recipe chose, at the temperature of a request."""
    if asked.temperature == 0 or asked.top_k == 1:
        return acceptors.kept(name)
    sampling = Sampling(temperature=asked.temperature, top_k=max(0, asked.top_k), top_p=asked.top_p)
    return acceptors.kept(name, sampling)


class Bundle:
    """What a choice is told, on its way from the scheduler's thread: together where it comes fast.

    The first step goes at once; later ones wait for those that come within an interval, and go with the first one after
    it. Waking the server for each token of a small model would take processor time from the next token.

    Args:
        send: Given what came, in order.
        interval_s: Least time between two calls of it, s.
    """

    def __init__(self, send: Callable[[list[Came]], None], interval_s: float) -> None:
        self._send, self._interval_s = send, interval_s
        self._held: list[Came] = []
        self._sent = -math.inf

    def tell(self, told: Told, rated: tuple[Rated, ...]) -> None:
        """Send what is told, or keep it for the next time."""
        self._held.append((told, rated))
        now = time.perf_counter()
        if isinstance(told, Step) and not told.finish and now - self._sent < self._interval_s:
            return
        held, self._held, self._sent = self._held, [], now
        self._send(held)


async def write(
    scheduler: Scheduler,
    by: Tokenizer,
    ends: frozenset[int],
    prompts: Sequence[Tokens],
    asked: Sampled,
    *,
    echo: bool = False,
    anew: bool = False,
    interval_s: float = 0.0,
) -> AsyncGenerator[Piece]:
    """Yield the pieces of all choices of a request as they come; texts that nobody waits for any more are ended.

    Args:
        scheduler: Where they are written.
        by: The tokenizer.
        ends: Tokens that end a text.
        prompts: (n,) token ids each; choice i follows prompt i // asked.n.
        asked: What the client said.
        echo: The prompts' log-probabilities are wanted.
        anew: The answer is no continuation of the prompt's text, but a turn of its own.
        interval_s: Least time between two pieces of a choice but its first and its last, s.

    Raises:
        UsageError: A prompt doesn't fit.
        LockedError: Too many wait already.
        ValueError: The model's logits aren't numbers.
    """
    loop = asyncio.get_running_loop()
    came: asyncio.Queue[tuple[int, list[Came]]] = asyncio.Queue()
    following = [tokens for tokens in prompts for _ in range(asked.n)]
    choices = [_Choice(i, tokens, asked, by, ends, anew=anew) for i, tokens in enumerate(following)]

    def sender(number: int) -> Callable[[list[Came]], None]:
        def send(held: list[Came]) -> None:
            with suppress(RuntimeError):  # the server is gone
                loop.call_soon_threadsafe(came.put_nowait, (number, held))

        return send

    numbers: list[int] = []
    try:
        for number, (choice, tokens) in enumerate(zip(choices, following, strict=True)):
            room = scheduler.target.max_tokens - len(tokens)
            work = choice.work(
                room, Bundle(sender(number), interval_s).tell, echo=echo, acceptor=scheduler.speculator.acceptor
            )
            numbers.append(scheduler.submit(work))
        left = len(choices)
        while left:
            number, held = await came.get()
            piece = choices[number].piece(held)
            left -= piece.finish is not None
            yield piece
    finally:
        for each in numbers:
            scheduler.cancel(each)
