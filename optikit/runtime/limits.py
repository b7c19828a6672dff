"""What a call to a decoder may ask for: checked in one place, so that every runtime refuses in the same words."""

from __future__ import annotations

from optikit.errors import UsageError
from optikit.runtime.protocol import Tokens


def check_call(tokens: Tokens, position: int, *, filled: int, vocab: int, max_tokens: int) -> None:
    """Refuse tokens that a decoder can't run at `position`.

    Args:
        tokens: (m,) token ids.
        position: Where they start.
        filled: Tokens that the cache holds.
        vocab: Width of the logits.
        max_tokens: Longest sequence the cache holds.

    Raises:
        UsageError: No tokens, a gap before them, an id outside the vocabulary, or a sequence that is too long.
    """
    if tokens.ndim != 1 or tokens.size == 0:
        raise UsageError(
            f"a decoder needs a row of tokens, not an array of shape {tokens.shape}", fix="give at least one token"
        )
    if not 0 <= position <= filled:
        raise UsageError(
            f"position {position} isn't within the {filled} tokens of the cache", fix="run what comes before it first"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise UsageError(
            f"token {low if low < 0 else high} is outside the vocabulary of {vocab}",
            fix="use the model's own tokenizer",
        )
    check_room(position + tokens.size, max_tokens)


def check_room(length: int, max_tokens: int) -> None:
    """Refuse a sequence that is longer than the cache.

    Raises:
        UsageError: If it is.
    """
    if length > max_tokens:
        message = f"{length} tokens don't fit: this decoder holds {max_tokens}"
        raise UsageError(message, fix="shorten the prompt, ask for fewer tokens, or load it with a larger max_tokens")
