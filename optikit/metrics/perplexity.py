"""Perplexity: exp of the mean negative log-likelihood per scored token, over windows that don't overlap.

A text is tokenized once; the first `windows` windows of `window` tokens are scored, the rest is dropped. A window of L
tokens scores L - 1: its first token has no context. This is the protocol of the GPTQ paper's scripts, on any text; its
id names the text by hash, because two files that are both called WikiText-2 have differed by half a point before.
Arithmetic is float64: a mean over thousands of float32 log-probabilities would lose the digits that are compared.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ROWS = 4
"""Positions worked on at a time: four rows of a 50,000-word vocabulary in float64 fit a second-level cache."""


def protocol(digest: str, window: int, windows: int) -> str:
    """Name the protocol: text by the first 8 hex digits of its sha256, window in tokens, number of windows.

    >>> protocol("3f9a12cd" + 56 * "0", 512, 16)
    'text-3f9a12cd@512x16'
    """
    return f"text-{digest[:8]}@{window}x{windows}"


def cut(tokens: NDArray[np.int64], window: int, windows: int) -> NDArray[np.int64]:
    """Return the first `windows` windows of `tokens` (n,) as (windows, window).

    Raises:
        ValueError: The text is too short; says how many windows fit.
    """
    fit = len(tokens) // window
    if fit < windows:
        msg = f"the text has {len(tokens)} tokens: {fit} windows of {window} fit, {windows} were asked for"
        raise ValueError(msg)
    return tokens[: window * windows].reshape(windows, window)


def token_nll(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> Floats:
    """Return -log softmax(logits)[target], nats, float64 (m,), of logits (m, vocab) and targets (m,)."""
    nll = np.empty(len(targets))
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        block = logits[rows].astype(np.float64)
        block -= block.max(axis=1, keepdims=True)
        wanted = np.take_along_axis(block, targets[rows, None], axis=1)[:, 0]
        nll[rows] = np.log(np.exp(block, out=block).sum(axis=1)) - wanted
    return nll


def perplexity(nll: Floats) -> float:
    """Return exp of the mean of negative log-likelihoods of any shape; inf where that overflows."""
    mean = float(nll.mean())
    return math.exp(mean) if mean < 709 else math.inf


def bits_per_byte(nll: Floats, scored_bytes: int) -> float:
    """Return bits needed per byte of the scored text: comparable across tokenizers, which perplexity isn't."""
    return float(nll.sum()) / math.log(2) / scored_bytes
