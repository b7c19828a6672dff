"""Texts written plainly and with speculation, timed after their first token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optikit.runtime.decoder import Decoder, Tokens
    from optikit.runtime.speculation.acceptors import Acceptor
    from optikit.runtime.speculation.decoding_loop import Step
    from optikit.runtime.speculation.speculator import Speculator

LOOP = 8
"""A text that holds the same run of this many tokens twice repeats itself."""


def repeats(tokens: Sequence[int]) -> bool:
    """Return whether a text repeats itself: it holds the same run of `LOOP` tokens twice.

    >>> repeats([*range(8), 99, *range(8)]), repeats(range(17))
    (True, False)
    """
    runs = [tuple(tokens[i : i + LOOP]) for i in range(len(tokens) - LOOP + 1)]
    return len(set(runs)) < len(runs)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt, written plainly and with speculation.

    Attributes:
        prompt: (n,).
        plain: (m,).
        steps: Of the speculated text.
        plain_ms, speculated_ms: Time of decoding after the first token.
        plain_first_ms, speculated_first_ms: Time before it: the prompt's run.
    """

    prompt: Tokens
    plain: Tokens
    plain_ms: float
    steps: tuple[Step, ...]
    speculated_ms: float
    plain_first_ms: float = 0.0
    speculated_first_ms: float = 0.0

    @property
    def answer_ms(self) -> tuple[float, float]:
        """(plain, speculated) time of the whole answer, the prompt's run included."""
        return self.plain_first_ms + self.plain_ms, self.speculated_first_ms + self.speculated_ms

    @property
    def speculated(self) -> tuple[int, ...]:
        """The speculated text."""
        return tuple(token for step in self.steps for token in step.tokens)

    @property
    def parts_at(self) -> int | None:
        """Index of the first token that differs, or that one text lacks; None where the texts are equal."""
        ours, theirs = self.plain.tolist(), self.speculated
        shared = min(len(ours), len(theirs))
        differs = (i for i in range(shared) if ours[i] != theirs[i])
        return next(differs, None if len(ours) == len(theirs) else shared)

    @property
    def loops(self) -> bool:
        """Whether the plain text repeats itself."""
        return repeats(self.plain.tolist())

    @property
    def ms_per_token(self) -> tuple[float, float] | None:
        """(plain, speculated) time of a token after the first; None where a text has no second token."""
        counts = len(self.plain) - 1, len(self.speculated) - 1
        return (self.plain_ms / counts[0], self.speculated_ms / counts[1]) if min(counts) > 0 else None


@dataclass(frozen=True)
class Writer:
    """A decoder with what ends its texts.

    Attributes:
        decoder: The compiled model.
        new_tokens: Most tokens to write.
        ends: Tokens that end a text.
        acceptor: Decides on drafts; None is greedy.
    """

    decoder: Decoder
    new_tokens: int
    ends: frozenset[int]
    acceptor: Acceptor | None = None

    def plain(self, prompt: Tokens) -> tuple[Tokens, float, float]:
        """Write a text the decoder's own way; return it and the milliseconds up to and after its first token."""
        import numpy as np

        tokens: list[int] = []
        called = time.perf_counter()
        start = 0.0
        for token in self.decoder.greedy(prompt, self.new_tokens):
            start = start or time.perf_counter()
            tokens.append(token)
            if token in self.ends:
                break
        return np.array(tokens, np.int64), (start - called) * 1000, (time.perf_counter() - start) * 1000

    def speculated(self, speculator: Speculator, prompt: Tokens) -> tuple[tuple[Step, ...], float, float]:
        """Write a text with speculation; return its steps and the milliseconds up to and after the first."""
        from optikit.runtime.speculation.acceptors import Greedy
        from optikit.runtime.speculation.decoding_loop import Request, generate

        request = Request(max_new_tokens=self.new_tokens, eos=self.ends, min_window=speculator.min_window)
        steps: list[Step] = []
        called = time.perf_counter()
        start = 0.0
        acceptor = self.acceptor or Greedy()
        for step in generate(self.decoder, speculator.drafter(), acceptor, prompt, request):
            start = start or time.perf_counter()
            steps.append(step)
        return tuple(steps), (start - called) * 1000, (time.perf_counter() - start) * 1000

    def pair(self, speculator: Speculator, prompt: Tokens, *, plain_first: bool) -> Pair:
        """Write a text both ways, one right after the other."""
        if plain_first:
            plain, plain_first_ms, plain_ms = self.plain(prompt)
            steps, first_ms, ms = self.speculated(speculator, prompt)
        else:
            steps, first_ms, ms = self.speculated(speculator, prompt)
            plain, plain_first_ms, plain_ms = self.plain(prompt)
        return Pair(
            prompt=prompt,
            plain=plain,
            plain_ms=plain_ms,
            steps=steps,
            speculated_ms=ms,
            plain_first_ms=plain_first_ms,
            speculated_first_ms=first_ms,
        )

    def text(self, speculator: Speculator, prompt: Tokens) -> Sequence[int]:
        """Return the speculated text."""
        return [token for step in self.speculated(speculator, prompt)[0] for token in step.tokens]
