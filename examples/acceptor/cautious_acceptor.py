"""An acceptor of a package of its own: greedy where the model is sure, one token at a time where it isn't.

`optikit.acceptors` calls `make` with the sampling that is asked for, or None at temperature 0. What comes back has to
have `lossless`, true or false, and `accept`. An acceptor keeps a beginning of the draft and adds one token of the
model's own; it sees the model's logits after all penalties, and needs to know nothing of the loop around it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MARGIN = 1.0
"""Logits that the likeliest token has to be ahead of the next one for a draft to go on."""


class Cautious:
    """Keeps draft tokens that equal the model's likeliest, up to the first that it isn't sure of."""

    lossless = True
    """At temperature 0 the text is the model's own, token by token: only the number of tokens per step changes."""

    def accept(self, draft: Any, _probs: Any, target_logits: Any, _rng: Any, /) -> tuple[int, int]:
        """Return how many draft tokens are kept, and the token that follows them.

        Args:
            draft: (k,) token ids, k ≥ 0.
            _probs: (k, vocab) or None: what each was drawn from.
            target_logits: (k + 1, vocab): row i follows the first i draft tokens.
            _rng: numpy Generator, the only source of randomness to use.
        """
        for i, token in enumerate(draft):
            second, first = np.partition(target_logits[i], -2)[-2:]
            if int(target_logits[i].argmax()) != int(token) or first - second < MARGIN:
                return i, int(target_logits[i].argmax())
        return len(draft), int(target_logits[-1].argmax())


def make(sampling: Any) -> Cautious:
    """Return the acceptor; it draws nothing, so it is for temperature 0 alone."""
    if sampling is not None:
        raise ValueError("cautious doesn't draw: leave the temperature out")
    return Cautious()
