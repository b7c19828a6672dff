"""Drafters: guess the next tokens cheaply, for the target to check all of them in one forward.

- `PromptLookup`: what followed the last tokens when they last occurred. Costs microseconds, needs no training.
- `DraftModel`: a small model of the same vocabulary writes ahead.
- `Medusa`: heads that read several tokens ahead off the target's last hidden state.
- `Eagle`: a layer that goes on from the target's hidden states of several depths.
- `FirstOf`: the first of several that has anything to say.

A bad draft costs time, never text: whatever a drafter returns, a lossless acceptor leaves the text as it would be. A
drafter of your own is any object with the members of `Drafter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from optikit.errors import UsageError
from optikit.runtime.decoder import Decoder, Logits, Tokens
from optikit.runtime.speculation import acceptors
from optikit.runtime.speculation.acceptors import Probabilities, Sampling

Hidden = NDArray[np.float32]
Features = NDArray[np.float32]
"""What blocks of the target were given, (tokens, blocks · width)."""
Heads = Callable[[Hidden, int], tuple[Tokens, Probabilities]]
"""From a hidden state (hidden,), and the token that was predicted from it, to the likeliest token of each head and its
probability, both (heads,)."""

NOTHING = np.empty(0, np.int64)
LOOKUP_LENGTHS: Mapping[int, int] = {3: 8, 2: 4}
"""Tokens that matched → tokens to draft: the longer the match, the further it can be trusted."""


class Draft(NamedTuple):
    """A chain of guesses.

    Attributes:
        tokens: (k,), k ≥ 0.
        by: Name of the drafter, "" for an empty draft.
        probs: (k, vocab): what each token was drawn from; None where nothing was drawn.
    """

    tokens: Tokens
    by: str
    probs: Probabilities | None = None


EMPTY = Draft(NOTHING, "")


class Drafter(Protocol):
    """Guesses the tokens that follow a text, which it is told piece by piece."""

    @property
    def reads_hidden(self) -> bool:
        """Whether `extend` needs the target's last hidden state."""
        ...

    @property
    def reads_features(self) -> bool:
        """Whether `extend` needs what blocks of the target were given, in the place of that state."""
        ...

    def start(self, prompt: Tokens, /) -> None:
        """Forget the text before; a new one begins with `prompt` (n,)."""
        ...

    def extend(self, tokens: Tokens, hidden: Hidden | None, /) -> None:
        """Take note of tokens that became text.

        Args:
            tokens: (m,), m ≥ 1.
            hidden: (hidden,): the target's state, after its final norm, that predicted the last of `tokens`. Or, where
                features are read, (r, features) of the tokens that the target has run since the last call, in order:
                the whole prompt first, then a token of the text and the draft behind it, rejected ones included. None
                where no drafter asked for any.
        """
        ...

    def draft(self, limit: int, rng: np.random.Generator, /) -> Draft:
        """Guess at most `limit` ≥ 1 tokens to follow the text.

        Whether a drawn token is part of the draft may not depend on which token was drawn: leaving out unlikely draws
        changes what they are draws from, and the text with it.
        """
        ...


class NoDraft:
    """Never drafts: plain decoding through the same loop."""

    reads_hidden = False
    reads_features = False

    def start(self, _prompt: Tokens, /) -> None:
        """Do nothing."""

    def extend(self, _tokens: Tokens, _hidden: Hidden | None, /) -> None:
        """Do nothing."""

    def draft(self, _limit: int, _rng: np.random.Generator, /) -> Draft:
        """Return the empty draft."""
        return EMPTY


class PromptLookup:
    """What followed when the text's last tokens last occurred: prompt lookup decoding (Saxena 2023).

    A repetition that reaches the end of the text is continued as the loop that it is. Noting and looking up a token
    take constant time.

    Args:
        lengths: Length of the match → tokens to draft after such a match; the longest match is taken.

    Raises:
        UsageError: No lengths, or some below 1.
    """

    reads_hidden = False
    reads_features = False
    name = "lookup"

    def __init__(self, lengths: Mapping[int, int] = LOOKUP_LENGTHS) -> None:
        if not lengths or min(*lengths, *lengths.values()) < 1:
            message = f"lookup lengths {dict(lengths)} must map matches of 1 token or more to drafts of 1 or more"
            raise UsageError(message, fix=f"use for example {dict(LOOKUP_LENGTHS)}")
        self.lengths = dict(sorted(lengths.items(), reverse=True))
        self._text: list[int] = []
        self._followed: dict[int, dict[tuple[int, ...], int]] = {}

    def start(self, prompt: Tokens, /) -> None:
        """Index a prompt."""
        self._text = []
        self._followed = {n: {} for n in self.lengths}
        self.extend(prompt, None)

    def extend(self, tokens: Tokens, _hidden: Hidden | None, /) -> None:
        """Index what came before each token; the newest n-gram waits until something has followed it."""
        text = self._text
        for token in tokens.tolist():
            for n, followed in self._followed.items():
                if len(text) >= n:
                    followed[tuple(text[-n:])] = len(text)
            text.append(token)

    def draft(self, limit: int, _rng: np.random.Generator, /) -> Draft:
        """Return what followed the longest match."""
        for n, followed in self._followed.items():
            start = followed.get(tuple(self._text[-n:]))
            if start is not None:
                period = len(self._text) - start
                length = min(limit, self.lengths[n])
                return Draft(np.array([self._text[start + i % period] for i in range(length)], np.int64), self.name)
        return EMPTY


class DraftModel:
    """A small decoder that writes ahead; Leviathan et al., arXiv:2211.17192.

    Args:
        decoder: The small model; nothing else may use its cache.
        vocab: Width of the target's logits.
        length: Tokens to draft; may be changed between steps.
        sampling: Draws the draft, from the same warped distribution as the acceptor's; None drafts greedily.
        gate: Stops before a token where the product of the likeliest choices' probabilities falls below this.

    Raises:
        UsageError: The vocabularies differ.
    """

    reads_hidden = False
    reads_features = False
    name = "draft"

    def __init__(
        self, decoder: Decoder, *, vocab: int, length: int = 4, sampling: Sampling | None = None, gate: float = 0.0
    ) -> None:
        if decoder.vocab != vocab:
            message = f"the draft has a vocabulary of {decoder.vocab} tokens, the model one of {vocab}"
            raise UsageError(message, fix="use a draft made with the model's own tokenizer")
        self.length = length
        self._decoder = decoder
        self._sampling = sampling
        self._gate = gate
        self._text: list[int] = []
        self._cached: list[int] = []

    def start(self, prompt: Tokens, /) -> None:
        """Begin again; the prompt is run with the first draft."""
        self._text = prompt.tolist()
        self._cached = []

    def extend(self, tokens: Tokens, _hidden: Hidden | None, /) -> None:
        """Keep as much of the cache as became text."""
        before = len(self._text)
        self._text += tokens.tolist()
        pairs = zip(self._cached[before:], self._text[before:], strict=False)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        del self._cached[before + kept :]

    def draft(self, limit: int, rng: np.random.Generator, /) -> Draft:
        """Write ahead token by token; nothing where the text has outgrown this model's context."""
        room = self._decoder.max_tokens - len(self._text) + 1
        length = min(limit, self.length, room)
        del self._cached[len(self._text) - 1 :]
        tokens: list[int] = []
        probs: list[Probabilities] = []
        sure = 1.0
        while len(tokens) < length:
            row = self._run(tokens[-1:] or self._text[len(self._cached) :])
            if self._gate > 0 and (sure := sure * confidence(row)) < self._gate:
                break
            if self._sampling is None:
                tokens.append(int(row.argmax()))
            else:
                probs.append(self._sampling.probabilities(row))
                tokens.append(acceptors.draw(probs[-1], rng))
        if not tokens:
            return EMPTY
        return Draft(np.array(tokens, np.int64), self.name, np.stack(probs) if probs else None)

    def _run(self, tokens: Sequence[int]) -> Logits:
        """Run tokens behind the cache and return the logits of the last."""
        logits = self._decoder.forward(np.array(tokens, np.int64), len(self._cached))
        self._cached += tokens
        row: Logits = logits[-1]
        return row


def confidence(row: Logits) -> float:
    """Return the probability of the likeliest token."""
    return 1 / float(np.exp(row - row.max()).sum())


class Medusa:
    """Heads on the target's last hidden state, one per token ahead; Cai et al., arXiv:2401.10774.

    Args:
        heads: Head i guesses the token i + 2 places behind the state it reads: the model's own head has the first. That
            is the newest token of the text, which sequential heads look at, too.
        length: Most tokens to draft; None is one per head.
        gate: Cuts the chain where the product of the heads' probabilities falls below this.
    """

    reads_hidden = True
    reads_features = False
    name = "medusa"

    def __init__(self, heads: Heads, *, length: int | None = None, gate: float = 0.0) -> None:
        self._heads = heads
        self._length = length
        self._gate = gate
        self._hidden: Hidden | None = None
        self._newest = 0

    def start(self, _prompt: Tokens, /) -> None:
        """Forget the last state."""
        self._hidden = None

    def extend(self, tokens: Tokens, hidden: Hidden | None, /) -> None:
        """Keep the newest state and the newest token, which was predicted from it."""
        self._hidden = hidden
        self._newest = int(tokens[-1])

    def draft(self, limit: int, _rng: np.random.Generator, /) -> Draft:
        """Return the heads' likeliest tokens as one chain."""
        if self._hidden is None:
            return EMPTY
        tokens, probs = self._heads(self._hidden, self._newest)
        sure = int((np.cumprod(probs) >= self._gate).sum())
        kept = tokens[: min(limit, sure, len(tokens) if self._length is None else self._length)]
        return Draft(kept, self.name) if len(kept) else EMPTY


class Continuing(Protocol):
    """An EAGLE-3 drafter's weights and cache; `eagle_session.EagleSession` is one."""

    max_tokens: int

    def begin(self) -> None:
        """Forget the text before."""
        ...

    def read(self, tokens: Tokens, features: Features) -> tuple[int, float]:
        """Take in rows (m,), and return the likeliest next token and its probability."""
        ...

    def ahead(self, token: int) -> tuple[int, float]:
        """Take in a token that was drafted, and return the likeliest next one and its probability."""
        ...


class Eagle:
    """A layer on what the target's blocks are given, and then on its own output; Li et al., arXiv:2503.01840.

    It is asked where nothing else drafts; what became text meanwhile is taken in then, all at once.

    Args:
        session: Its weights, with a cache that nobody else may use.
        length: Most tokens to draft.
        gate: Stops before a token where the product of the chain's probabilities falls below this.
    """

    reads_hidden = False
    reads_features = True
    name = "eagle3"

    def __init__(self, session: Continuing, *, length: int, gate: float = 0.0) -> None:
        self._session = session
        self._length = length
        self._gate = gate
        self._tokens: list[int] = []
        self._features: list[Features] = []
        self._known = 0

    def start(self, prompt: Tokens, /) -> None:
        """Begin again; the first token has no row of its own, as nothing predicted it."""
        self._session.begin()
        self._tokens = prompt[1:].tolist()
        self._features = []
        self._known = len(self._tokens)

    def extend(self, tokens: Tokens, features: Features | None, /) -> None:
        """Keep the new rows: each token, and the features of the one before it."""
        if features is None or self._known >= self._session.max_tokens:
            return  # beyond its context nothing is drafted, so nothing need be kept
        self._tokens += tokens.tolist()
        missing = len(self._tokens) - sum(map(len, self._features))  # what the target ran beyond was rejected
        self._features.append(features[:missing].copy())
        self._known += len(tokens)

    def draft(self, limit: int, _rng: np.random.Generator, /) -> Draft:
        """Draft token by token; nothing where the text has outgrown this drafter's context."""
        length = min(limit, self._length)
        if not self._features or self._known + length > self._session.max_tokens:
            return EMPTY
        best, prob = self._session.read(np.array(self._tokens, np.int64), np.concatenate(self._features))
        self._tokens, self._features = [], []
        tokens: list[int] = []
        sure = prob
        while sure >= self._gate:
            tokens.append(best)
            if len(tokens) == length:
                break
            best, prob = self._session.ahead(best)
            sure *= prob
        return Draft(np.array(tokens, np.int64), self.name) if tokens else EMPTY


class CachedDrafts(NamedTuple):
    """What heads or a draft model guess at every place of a known text.

    Attributes:
        tokens: (m, k): row i is what it guesses once i + 1 tokens of the text are known.
        sure: (m, k): how sure it is of each.
    """

    tokens: Tokens
    sure: Probabilities


class CachedDrafter:
    """Drafts from a cache: stands for heads or a draft model where a text is replayed many times.

    Args:
        cached: Drafts at every place of the text that is replayed.
        name: The drafter that it stands for.
        length: Most tokens to draft.
        gate: As that drafter's.
    """

    reads_hidden = False
    reads_features = False

    def __init__(self, cached: CachedDrafts, *, name: str, length: int, gate: float) -> None:
        self._cached = cached
        self._name = name
        self._length = length
        self._gate = gate
        self._known = 0

    def start(self, _prompt: Tokens, /) -> None:
        """Begin the text again."""
        self._known = 0

    def extend(self, tokens: Tokens, _hidden: Hidden | None, /) -> None:
        """Move on."""
        self._known += len(tokens)

    def draft(self, limit: int, _rng: np.random.Generator, /) -> Draft:
        """Return the cached draft at this place, as far as the gate lets it through."""
        row = self._known - 1
        sure = int((np.cumprod(self._cached.sure[row]) >= self._gate).sum())
        kept = self._cached.tokens[row, : min(limit, self._length, sure)]
        return Draft(kept, self._name) if len(kept) else EMPTY


class FirstOf:
    """Asks drafters in order and takes the first draft that isn't empty: lookup, then heads."""

    def __init__(self, drafters: Iterable[Drafter]) -> None:
        self._drafters = tuple(drafters)

    @property
    def reads_hidden(self) -> bool:
        """Whether any of them reads hidden states."""
        return any(each.reads_hidden for each in self._drafters)

    @property
    def reads_features(self) -> bool:
        """Whether any of them reads features."""
        return any(each.reads_features for each in self._drafters)

    def start(self, prompt: Tokens, /) -> None:
        """Pass it on to every drafter."""
        for each in self._drafters:
            each.start(prompt)

    def extend(self, tokens: Tokens, hidden: Hidden | None, /) -> None:
        """Pass it on to every drafter."""
        for each in self._drafters:
            each.extend(tokens, hidden)

    def draft(self, limit: int, rng: np.random.Generator, /) -> Draft:
        """Return the first draft that isn't empty."""
        drafts = (each.draft(limit, rng) for each in self._drafters)
        return next((draft for draft in drafts if len(draft.tokens)), EMPTY)
