"""Logits processors and stopping: what a text may not repeat, and where it ends.

Both are asked at every position of a speculated window, with the text as it would be there: a penalty that only knew
the text before the window would let a draft repeat itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from optikit.errors import UsageError
from optikit.runtime.decoder import Logits, Tokens

Stop = Callable[[Sequence[int]], bool]
"""From the tokens written so far, the newest last, to whether the text ends with it."""
Processor = Callable[[Logits, Tokens], Logits]
"""From logits (vocab,) and the whole text before them (n,), prompt included, to new logits (vocab,).

It may read anything and has to leave its arguments as they are.
"""


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide the positive logits of tokens that already occur by `factor`, multiply the negative ones (CTRL, 2019).

    Attributes:
        factor: 1 changes nothing; transformers' `repetition_penalty`.

    Raises:
        UsageError: The factor isn't positive.
    """

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor < np.inf:
            raise UsageError(
                f"a repetition penalty of {self.factor} has no meaning", fix="use 1 for none, 1.1 for some"
            )

    def __call__(self, logits: Logits, text: Tokens) -> Logits:
        """Return the penalized logits."""
        out = logits.copy()
        seen = logits[text]
        out[text] = np.where(seen < 0, seen * np.float32(self.factor), seen / np.float32(self.factor))
        return out


class StopStrings:
    """Stops where the decoded text contains one of some strings, wherever the borders of its tokens lie.

    Args:
        decode: From tokens to text, e.g. `tokenizer.decode`.
        strings: Strings to stop at; none of them empty.

    Raises:
        UsageError: An empty string, which every text contains.
    """

    def __init__(self, decode: Callable[[list[int]], str], strings: Sequence[str]) -> None:
        if not all(strings):
            raise UsageError("an empty stop string stops every text at once", fix="leave it out")
        self._decode = decode
        self._strings = tuple(strings)
        self._longest = max(map(len, strings), default=0)

    def __call__(self, written: Sequence[int]) -> bool:
        """Return whether the newest token completes a stop string.

        Looked for in the end of the text only: what was complete before has already stopped it. A tail of tokens may
        begin inside a character, so it has to decode to a little more than the longest string.
        """
        count = self._longest + 4
        while True:
            tail = self._decode(list(written[-count:]))
            if len(tail) >= self._longest + 4 or count >= len(written):
                return any(string in tail for string in self._strings)
            count *= 2


@dataclass(frozen=True)
class Penalties:
    """OpenAI's penalties and biases: logits of written tokens fall by how often they occurred, others move as told.

    Attributes:
        prompt: Tokens of the prompt, which don't count.
        frequency: Taken off for every time that a token was written.
        presence: Taken off once for a token that was written.
        bias: Token → what is added to its logit, always.
    """

    prompt: int
    frequency: float = 0.0
    presence: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __call__(self, logits: Logits, text: Tokens) -> Logits:
        """Return the penalized logits."""
        out = logits.copy()
        for token, value in self.bias.items():
            out[token] += np.float32(value)
        written, counts = np.unique(text[self.prompt :], return_counts=True)
        out[written] -= (self.frequency * counts + self.presence * (counts > 0)).astype(np.float32)
        return out


class Recorder:
    """Changes nothing, and keeps the logits of every position until they are taken."""

    def __init__(self) -> None:
        self._rows: list[Logits] = []

    def __call__(self, logits: Logits, _text: Tokens) -> Logits:
        """Return the logits as they are."""
        self._rows.append(logits.copy())
        return logits

    def take(self, count: int) -> Logits:
        """Return the logits (count, vocab) of a step's tokens, and forget those of drafts that weren't kept."""
        rows, self._rows = self._rows[:count], []
        return np.stack(rows)
