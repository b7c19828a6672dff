"""Scoring windows of text through any decoder: log-likelihoods, likeliest tokens, divergence from kept logits.

Windows go through in chunks, so that memory is bound by a chunk's logits, whatever the window; the decoder's own
key-value cache joins the chunks, which is also how a server reads a long prompt. Kept logits are a plain stream,
written and read in order: a memory map of a gigabyte would count as memory of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from optikit.metrics import divergence, perplexity
from optikit.metrics.statistics import Floats
from optikit.runtime.protocol import Decoder, Logits

CHUNK = 256
"""Positions per call: the logits of a 50,000-word vocabulary are then 50 MB."""


class NotFiniteError(ValueError):
    """A runtime returned NaN or infinity; `window` says where."""

    def __init__(self, window: int, what: str) -> None:
        super().__init__(f"{what} of window {window} is not a finite number")
        self.window = window


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was found at every scored position of w windows of L tokens.

    Attributes:
        nll: Negative log-likelihood of the text's own token, nats, (w, L - 1).
        top1: Likeliest token, (w, L - 1).
        divergence: From the baseline, nats, (w, L - 1); None where nothing was given to compare with.
    """

    nll: Floats
    top1: NDArray[np.int32]
    divergence: Floats | None


def score(
    decoder: Decoder,
    windows: NDArray[np.int64],
    *,
    against: BinaryIO | None = None,
    keep: BinaryIO | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Scores:
    """Score `windows` (w, L); each starts with an empty cache, its first token isn't scored.

    Args:
        decoder: The model.
        windows: Token ids.
        against: The baseline's kept logits: float16 (w, L - 1, vocab), raw, read once from here on; or None.
        keep: Where to write this model's logits in that form, or None.
        progress: Called after every window.

    Raises:
        NotFiniteError: The model returned NaN, or infinity where it matters.
    """
    shape = (windows.shape[0], windows.shape[1] - 1)
    nll, top1 = np.empty(shape), np.empty(shape, np.int32)
    apart = None if against is None else np.empty(shape)
    for index, window in enumerate(windows):
        for start, logits in _chunks(decoder, window):
            at = (index, slice(start, start + len(logits)))
            nll[at] = perplexity.token_nll(logits, window[1:][at[1]])
            if not np.isfinite(nll[at]).all():
                raise NotFiniteError(index, "a log-likelihood")
            top1[at] = logits.argmax(axis=1)
            if keep is not None:
                divergence.keep(logits).tofile(keep)
            if apart is not None and against is not None:
                base = np.fromfile(against, np.float16, logits.size).reshape(logits.shape)
                apart[at] = divergence.token_divergence(base, logits)
                if not np.isfinite(apart[at]).all():
                    raise NotFiniteError(index, "a divergence")
        progress(index + 1, len(windows), "window")
    return Scores(nll=nll, top1=top1, divergence=apart)


def _chunks(decoder: Decoder, window: NDArray[np.int64]) -> Iterator[tuple[int, Logits]]:
    """Yield (first position, logits) chunk by chunk; the window's last token predicts nothing that is scored."""
    for start in range(0, len(window) - 1, CHUNK):
        yield start, decoder.forward(window[start : min(start + CHUNK, len(window) - 1)], start)
