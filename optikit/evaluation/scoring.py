"""Scoring windows of text through any decoder: log-likelihoods, likeliest tokens, divergence from kept logits.

Windows go through in chunks, so that memory is bound by a chunk's logits, whatever the window; the decoder's own
key-value cache joins the chunks, which is also how a server reads a long prompt. Kept logits are a plain stream,
written and read in order: a memory map of a gigabyte would count as memory of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from optikit.evaluation import divergence, perplexity
from optikit.evaluation.statistics import Floats
from optikit.runtime.decoder import Decoder, Logits

CHUNK = 256
"""Positions per call: the logits of a 50,000-word vocabulary are then 50 MB."""


class NotFiniteError(ValueError):
    """A runtime returned NaN or infinity; `window` says where."""

    def __init__(self, window: int, what: str) -> None:
        super().__init__(f"{what} of window {window} is not a finite number")
        self.window = window


@dataclass(frozen=True)
class Window:
    """Tokens (n,) that the model reads from an empty cache; the last `scored` < n of them are scored."""

    tokens: NDArray[np.int64]
    scored: int


Reading = Callable[[int], Iterator[Logits]]
"""Reads the window of a number; yields the logits that predict its scored tokens, in chunks of (positions, vocab)."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was found at every scored position of w windows, of which the longest scores m tokens.

    Rows of shorter windows end with NaN, and with -1 in `top1`.

    Attributes:
        nll: Negative log-likelihood of the text's own token, nats, (w, m).
        top1: Likeliest token, (w, m).
        divergence: From the baseline, nats, (w, m), NaN in windows that weren't compared; None if none was.
    """

    nll: Floats
    top1: NDArray[np.int32]
    divergence: Floats | None

    @property
    def known(self) -> Floats:
        """Negative log-likelihoods of all scored tokens in their order, nats, (n,)."""
        found: Floats = self.nll[~np.isnan(self.nll)]
        return found


def score(
    read: Reading,
    windows: Sequence[Window],
    *,
    against: BinaryIO | None = None,
    keep: BinaryIO | None = None,
    compared: int | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Scores:
    """Score windows of text.

    Args:
        read: The model; asked window by window, in their order. `cached` is that of a decoder.
        windows: What to read, and what of it to score.
        against: The baseline's kept logits: float16 (scored tokens, vocab), raw, read once from here on; or None.
        keep: Where to write this model's logits in that form, or None.
        compared: Number of windows, the first ones, whose logits are kept or compared; None is all.
        progress: Called after every window.

    Raises:
        NotFiniteError: The model returned NaN, or infinity where it matters.
    """
    shape = (len(windows), max(window.scored for window in windows))
    nll, top1 = np.full(shape, np.nan), np.full(shape, -1, np.int32)
    apart = None if against is None else np.full(shape, np.nan)
    for index, window in enumerate(windows):
        is_compared = compared is None or index < compared
        targets_left, start = window.tokens[len(window.tokens) - window.scored :], 0
        for logits in read(index):
            targets, targets_left = np.split(targets_left, [len(logits)])
            at = (index, slice(start, start + len(logits)))
            start += len(logits)
            nll[at] = perplexity.token_nll(logits, targets)
            _check_finite(nll[at], index, "a log-likelihood")
            top1[at] = logits.argmax(axis=1)
            if keep is not None and is_compared:
                divergence.keep(logits).tofile(keep)
            if apart is not None and against is not None and is_compared:
                base = np.fromfile(against, np.float16, logits.size).reshape(logits.shape)
                apart[at] = divergence.token_divergence(base, logits)
                _check_finite(apart[at], index, "a divergence")
        progress(index + 1, len(windows), "window")
    return Scores(nll=nll, top1=top1, divergence=apart)


def _check_finite(found: Floats, window: int, what: str) -> None:
    if not np.isfinite(found).all():
        raise NotFiniteError(window, what)


def cached(decoder: Decoder, windows: Sequence[Window]) -> Reading:
    """Return what reads windows by a decoder, chunk by chunk, each going on where its cache ends."""
    return lambda index: _chunks(decoder, windows[index])


def _chunks(decoder: Decoder, window: Window) -> Iterator[Logits]:
    """Yield the logits of scored positions chunk by chunk; the last token predicts nothing that is scored."""
    first = len(window.tokens) - window.scored - 1  # the position that predicts the first scored token
    for start in range(0, first, CHUNK):  # context: only the cache is wanted
        decoder.forward(window.tokens[start : min(start + CHUNK, first)], start, rows=1)
    for start in range(first, len(window.tokens) - 1, CHUNK):
        yield decoder.forward(window.tokens[start : min(start + CHUNK, len(window.tokens) - 1)], start)
