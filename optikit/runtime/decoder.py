"""`Decoder`: what every runtime offers, and all that evaluation and the decoding loops ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]
SinglePath = Literal["own", "verify"]
"""What runs a token alone, where a decoder has other kernels for several tokens: kernels for one, or those."""


class Decoder(Protocol):
    """A model with a key-value cache, batch 1.

    Attributes:
        runtime: `transformers` or `onnxruntime`.
        dtype: Read back from the loaded model, e.g. `float32`, `bfloat16`, `int4`.
        threads: CPU threads that it uses.
        vocab: Width of the logits.
        max_tokens: Longest sequence the cache holds.
    """

    runtime: str
    dtype: str
    threads: int
    vocab: int
    max_tokens: int

    def forward(self, tokens: Tokens, position: int, rows: int | None = None) -> Logits:
        """Run `tokens` (m,) at `position`, after whatever the cache holds before it.

        The cache is cut to `position` first: rolling back is passing a smaller position.

        Args:
            tokens: (m,), m ≥ 1.
            position: Where they start.
            rows: Positions whose logits are wanted, the last ones, 1 ≤ rows ≤ m; None is all. A prompt needs one.

        Returns:
            Their logits, (rows, vocab) float32.
        """
        ...

    def greedy(self, prompt: Tokens, new_tokens: int) -> Iterator[int]:
        """Yield exactly `new_tokens` greedy tokens after `prompt` (n,), each as soon as it is known; EOS is ignored."""
        ...


class Window(NamedTuple):
    """Tokens of one of several texts.

    Attributes:
        place: Which text's cache they belong to, from 0.
        tokens: (m,), m ≥ 1.
        position: Where they start.
        rows: Positions whose logits are wanted, the last ones, 1 ≤ rows ≤ m.
    """

    place: int
    tokens: Tokens
    position: int
    rows: int


class BatchDecoder(Protocol):
    """A model with key-value caches for several texts, each of its own length.

    Attributes:
        runtime: As a `Decoder`'s.
        vocab: Width of the logits.
        max_tokens: Longest sequence a cache holds.
        places: Texts that it holds at once.
    """

    runtime: str
    vocab: int
    max_tokens: int
    places: int

    def forward(self, windows: Sequence[Window]) -> list[Logits]:
        """Run windows of different texts, of any lengths, at once; each cache is cut to its window's position first.

        Args:
            windows: At least one, at most one of each place.

        Returns:
            Of each window its logits, (rows, vocab) float32; the next call may overwrite them.
        """
        ...

    def move(self, source: int, target: int) -> None:
        """Put the cache of place `source` in that of `target`, whose text is over.

        Whoever calls it keeps the texts that run in places 0, 1, …: a decoder may be faster there.
        """
        ...
