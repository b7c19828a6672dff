"""`Decoder`: what every runtime offers, and all that evaluation and the decoding loops ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


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
