"""Checks of a decoder's arguments, in one place, so that every runtime refuses in the same words."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from optikit.errors import UsageError
from optikit.runtime.decoder import Tokens


def check_call(
    tokens: Tokens, position: int, *, filled: int, vocab: int, max_tokens: int, rows: int | None = None
) -> None:
    """Refuse tokens that a decoder can't run at `position`.

    Args:
        tokens: (m,) token ids.
        position: Where they start.
        filled: Tokens that the cache holds.
        vocab: Width of the logits.
        max_tokens: Longest sequence the cache holds.
        rows: Positions whose logits are wanted.

    Raises:
        UsageError: No tokens, a gap before them, an id outside the vocabulary, too long a sequence, too many rows.
    """
    if tokens.ndim != 1 or tokens.size == 0:
        raise UsageError(
            f"a decoder needs a row of tokens, not an array of shape {tokens.shape}", fix="give at least one token"
        )
    if rows is not None and not 1 <= rows <= tokens.size:
        raise UsageError(f"{rows} rows of logits of {tokens.size} tokens can't be had", fix="ask for 1 to all of them")
    if not 0 <= position <= filled:
        raise UsageError(
            f"position {position} isn't within the {filled} tokens of the cache", fix="run what comes before it first"
        )
    low, high = (int(tokens[0]),) * 2 if tokens.size == 1 else (int(tokens.min()), int(tokens.max()))
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


def require_blocks(blocks: Sequence[int], count: int) -> None:
    """Refuse to show the inputs of blocks that a model doesn't have.

    Raises:
        UsageError: Naming them.
    """
    beyond = [block for block in blocks if not 0 <= block < count]
    if beyond:
        message = f"the drafter reads what block {beyond[0]} is given, and the model has {count}"
        raise UsageError(message, fix="use a drafter that was trained for this model")


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return a cache as the argument of a transformers model: `cache` since 5.24, which refuses the other soon.

    Args:
        model: A transformers model.
        cache: Its keys and values.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}
