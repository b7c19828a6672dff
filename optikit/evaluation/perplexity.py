"""Perplexity: exp of the mean negative log-likelihood per scored token; which are scored, `perplexity_protocols` says.

Arithmetic is float64: a mean over thousands of float32 log-probabilities would lose the digits that are compared.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ROWS = 4
"""Positions worked on at a time: four rows of a 50,000-word vocabulary in float64 fit a second-level cache."""


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


def perplexity(nll: Floats, units: int | None = None) -> float:
    """Return exp of the mean of negative log-likelihoods of any shape, per token or per `units`; inf on overflow."""
    mean = float(nll.mean()) if units is None else float(nll.sum()) / units
    return math.exp(mean) if mean < 709 else math.inf


def bits_per_byte(nll: Floats, scored_bytes: int) -> float:
    """Return bits needed per byte of the scored text: comparable across tokenizers, which perplexity isn't."""
    return float(nll.sum()) / math.log(2) / scored_bytes
