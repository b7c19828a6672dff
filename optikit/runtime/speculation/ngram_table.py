"""`NGramDrafter`: draft what the model usually wrote after the last few tokens, from a datastore of its own texts.

Paper   He et al. 2023, REST, arXiv:2311.08252: drafts retrieved from a datastore instead of computed by a model
Cost    a binary search per token and length of context; 16 bytes per n-gram
Differs the datastore is the model's own greedy answers to prompts of the kind that it gets, so it holds its habits, not
        the world's; each n-gram keeps its likeliest successor only, with how sure that is

Beside a lookup in the text itself it fills the gap that lookups have: phrases that come for the first time in a text,
but not in a deployment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from optikit.errors import IntegrityError
from optikit.runtime.decoder import Tokens
from optikit.runtime.speculation.drafters import EMPTY, Draft, Hidden

LONGEST = 4
"""Tokens of context at most."""
MULTIPLIER = 0x9E3779B97F4A7C15
SEED = 0xD1B54A32D192ED03
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class NGramDatastore:
    """The likeliest successor of every n-gram of the model's own texts, n from 1 to `LONGEST`.

    Attributes:
        keys: (entries,) uint64, ascending: hashes of n-grams. A collision costs a wrong guess, nothing else.
        tokens: (entries,) int64.
        sure: (entries,) float32: count of the successor / (count of the n-gram + 1).
    """

    keys: NDArray[np.uint64]
    tokens: NDArray[np.int64]
    sure: NDArray[np.float32]

    def after(self, context: Sequence[int]) -> tuple[int, float] | None:
        """Return the successor of the longest known end of a context, and how sure it is; None where none is known."""
        for n in range(min(LONGEST, len(context)), 0, -1):
            key = _hash(context[-n:])
            at = int(np.searchsorted(self.keys, np.uint64(key)))
            if at < len(self.keys) and int(self.keys[at]) == key:
                return int(self.tokens[at]), float(self.sure[at])
        return None


def _hash(tokens: Sequence[int]) -> int:
    """Hash an n-gram; the number of tokens is part of it."""
    value = (len(tokens) * SEED) & MASK
    for token in tokens:
        value = ((value ^ (token + 1)) * MULTIPLIER) & MASK
        value ^= value >> 29
    return value


def _hashes(windows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash the rows of (count, n) as `_hash` does."""
    value = np.full(len(windows), (windows.shape[1] * SEED) & MASK, np.uint64)
    for column in windows.T:
        value = (value ^ (column + 1).astype(np.uint64)) * np.uint64(MULTIPLIER)
        value ^= value >> np.uint64(29)
    return value


def build(texts: Sequence[tuple[Tokens, Tokens]]) -> NGramDatastore:
    """Build a datastore from (prompt, text) pairs; a prompt's end is context, but only the text is ever a successor."""
    seen = [_successors(prompt, text, n) for prompt, text in texts for n in range(1, LONGEST + 1)]
    keys = np.concatenate([np.empty(0, np.uint64), *(each for each, _ in seen)])
    tokens = np.concatenate([np.empty(0, np.int64), *(each for _, each in seen)])
    return _likeliest(keys, tokens)


def _successors(prompt: Tokens, text: Tokens, n: int) -> tuple[NDArray[np.uint64], Tokens]:
    """Return the hash of the n tokens before each token of a text, and the token."""
    before = prompt[-n:]
    missing = n - len(before)
    whole = np.concatenate([before, text])
    if len(whole) <= n:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(whole, n)[:-1]
    return _hashes(windows), text[missing:]


def _likeliest(keys: NDArray[np.uint64], tokens: Tokens) -> NGramDatastore:
    """Return each key once, with its most frequent token (the lowest of equals)."""
    order = np.lexsort((tokens, keys))
    keys, tokens = keys[order], tokens[order]
    changes = (keys[1:] != keys[:-1]) | (tokens[1:] != tokens[:-1])
    pairs = np.flatnonzero(np.r_[len(keys) > 0, changes])
    counts = np.diff(np.r_[pairs, len(keys)])
    by_count = np.lexsort((tokens[pairs], -counts, keys[pairs]))
    pairs, counts = pairs[by_count], counts[by_count]
    first = np.flatnonzero(np.r_[len(pairs) > 0, keys[pairs][1:] != keys[pairs][:-1]])
    totals = np.add.reduceat(counts, first) if len(first) else counts
    best = pairs[first]
    return NGramDatastore(keys[best], tokens[best], (counts[first] / (totals + 1)).astype(np.float32))


def save(datastore: NGramDatastore, path: Path) -> None:
    """Write a datastore."""
    save_file({"keys": datastore.keys, "tokens": datastore.tokens, "sure": datastore.sure}, path)


def load(path: Path) -> NGramDatastore:
    """Read a datastore.

    Raises:
        IntegrityError: It isn't one.
    """
    try:
        found = load_file(path)
        table = NGramDatastore(found["keys"], found["tokens"], found["sure"])
    except (OSError, SafetensorError, KeyError) as error:
        message = f"{path} isn't a datastore of n-grams: {error}"
        raise IntegrityError(message, fix="run the recipe again") from error
    if not len(table.keys) == len(table.tokens) == len(table.sure) or np.any(table.keys[1:] <= table.keys[:-1]):
        raise IntegrityError(f"{path} holds n-grams out of order", fix="run the recipe again")
    return table


class NGramDrafter:
    """Drafts along the likeliest successors while the product of their confidences stays above a gate.

    Args:
        datastore: Of the model's own texts.
        gate: Least product.
        length: Most tokens to draft.
    """

    reads_hidden = False
    reads_features = False
    name = "ngram"

    def __init__(self, datastore: NGramDatastore, *, gate: float = 0.4, length: int = 4) -> None:
        self._datastore = datastore
        self._gate = gate
        self._length = length
        self._end: list[int] = []

    def start(self, prompt: Tokens, /) -> None:
        """Keep the prompt's end."""
        self._end = prompt[-LONGEST:].tolist()

    def extend(self, tokens: Tokens, _hidden: Hidden | None, /) -> None:
        """Keep the text's end."""
        self._end = (self._end + tokens[-LONGEST:].tolist())[-LONGEST:]

    def draft(self, limit: int, _rng: np.random.Generator, /) -> Draft:
        """Return the chain of likeliest successors that the gate lets through."""
        context, sure = list(self._end), 1.0
        start = len(context)
        while len(context) - start < min(limit, self._length):
            found = self._datastore.after(context)
            if found is None or (sure := sure * found[1]) < self._gate:
                break
            context.append(found[0])
        drafted = context[start:]
        return Draft(np.array(drafted, np.int64), self.name) if drafted else EMPTY
