"""Whether speculation left every text as it was; where texts part, whether that is a tie between kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optikit.errors import StageFailedError

if TYPE_CHECKING:
    from optikit.evaluation.paired_decoding import Pair, Writer
    from optikit.runtime.decoder import Decoder
    from optikit.runtime.speculation.speculator import Speculator
    from optikit.runtime.speculation.tuning import Written

WINDOW = 16
TEXTS = 8
TOP = 50
"""Logits that kernels are compared on: the likeliest, which alone decide."""


def kernel_noise(decoder: Decoder, texts: Sequence[Written]) -> float:
    """Return the largest difference of a logit between running a token alone and in a window, among the likeliest."""
    import numpy as np

    largest = 0.0
    for written in texts[:TEXTS]:
        window, position = written.text[:WINDOW], len(written.prompt)
        decoder.forward(written.prompt, 0, 1)
        together = decoder.forward(window, position)
        alone = np.concatenate([decoder.forward(window[i : i + 1], position + i) for i in range(len(window))])
        likeliest = np.argsort(-together, axis=1)[:, :TOP]
        apart = np.take_along_axis(np.abs(together - alone), likeliest, axis=1)
        largest = max(largest, float(apart.max()))
    return largest


def compare(writer: Writer, speculator: Speculator, pairs: Sequence[Pair], noise: float) -> dict[str, Any]:
    """Return how many texts are equal, and how the others' first differences are explained.

    A difference is a tie where plain decoding preferred its token by no more than two logits can be moved by the noise
    of the kernels, and where both texts are equal once neither ever runs a token alone.

    Raises:
        StageFailedError: A difference isn't a tie.
    """
    apart = [pair for pair in pairs if pair.parts_at is not None]
    preferred = [_preference(writer.decoder, pair) for pair in apart]
    windows, silent = replace(speculator, min_window=2), replace(speculator, min_window=2, method="off")
    for pair, margin in zip(apart, preferred, strict=True):
        if margin > 2 * noise or writer.text(windows, pair.prompt) != writer.text(silent, pair.prompt):
            message = (
                f"speculation changed a text at token {pair.parts_at}: plain decoding preferred its own by "
                f"{margin:.3f} there, and the engine's kernels differ by up to {noise:.3f}"
            )
            raise StageFailedError(message, fix="drop the speculate stage, and report this with the recipe")
    return {
        "exact_match": (len(pairs) - len(apart)) / len(pairs),
        "explained_ties": len(apart),
        "unexplained": 0,
        "largest_tie_margin": max(preferred, default=0.0),
        "kernel_noise": noise,
    }


def count(pairs: Sequence[Pair], noise: float) -> dict[str, Any]:
    """Return how many texts are equal, of an acceptor that may change them: no difference has to be explained."""
    apart = sum(pair.parts_at is not None for pair in pairs)
    found = {"exact_match": 1 - apart / len(pairs), "explained_ties": 0, "unexplained": apart}
    return found | {"largest_tie_margin": None, "kernel_noise": noise}


def _preference(decoder: Decoder, pair: Pair) -> float:
    """Return the logit of plain decoding's token over that of the speculated one, where the texts part.

    The text before is run as plain decoding ran it, token by token. Infinite where one text just ends: equal tokens
    before it would have ended both.
    """
    at = pair.parts_at or 0
    if at >= min(len(pair.plain), len(pair.speculated)):
        return float("inf")
    row = decoder.forward(pair.prompt, 0, 1)[0]
    for i in range(at):
        row = decoder.forward(pair.plain[i : i + 1], len(pair.prompt) + i)[0]
    return float(row[int(pair.plain[at])] - row[pair.speculated[at]])
