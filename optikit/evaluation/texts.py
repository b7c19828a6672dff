"""Tokens that every arm of a measurement sees: read once, tokenized once, by the baseline's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optikit import records
from optikit.errors import InputMissingError
from optikit.models import tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer


def read(path: Path) -> str:
    """Read a UTF-8 text that holds something.

    Raises:
        InputMissingError: No such file, not UTF-8, or nothing but blanks.
    """
    text = records.read(path)
    if not text.strip():
        raise InputMissingError(f"{path} holds no text", fix="give a text, or check `part` and `drop_lines`")
    return text


def opening_token(directory: Path) -> int:
    """Return the token that opens a document: the beginning of a text, or where there is none the end of one.

    Raises:
        InputMissingError: The tokenizer names neither.
    """
    by = tokenizer.configured(directory)
    found = by.eos_token_id if by.bos_token_id is None else by.bos_token_id
    if found is None:
        message = f"the tokenizer of {directory} has no token that begins or ends a text"
        raise InputMissingError(message, fix="use another protocol, or name one in tokenizer_config.json")
    return int(found)


MARGIN = 1000
"""Characters before a cut whose tokens aren't sure yet."""


@dataclass(frozen=True)
class Encoded:
    """A text as tokens. `ends` is the offset, in bytes of UTF-8, where the text of each token ends."""

    tokens: NDArray[np.int64]
    ends: NDArray[np.int64]


def encode(text: str, by: Tokenizer, *, at_least: int | None = None, special: bool = False) -> Encoded:
    """Tokenize a text as one piece, with the special tokens that the tokenizer opens and ends it with if asked.

    With `at_least`, only as much of its start as holds that many tokens, or all of it. What follows decides how a word
    at the cut is split, so tokens of the last thousand characters before a cut are left out.
    """
    import numpy as np

    length = len(text) if at_least is None else min(len(text), 6 * at_least + 2 * MARGIN)
    while True:
        encoding = tokenizer.encoding(by, text[:length], special=special)
        # special tokens have no place in the text: one at its end stands where the text ends
        ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets] or [0], np.int64))[: len(encoding)]
        sure = len(ends) if length == len(text) else int(np.searchsorted(ends, length - MARGIN))
        if length == len(text) or sure >= (at_least or 0):
            break
        length = min(len(text), 2 * length)
    characters = np.frombuffer(text[:length].encode("utf-32-le"), np.uint32)
    widths = 1 + (characters > 0x7F).astype(np.int64) + (characters > 0x7FF) + (characters > 0xFFFF)
    offsets = np.concatenate([[0], np.cumsum(widths)])
    return Encoded(np.array(encoding.ids[:sure], np.int64), offsets[ends[:sure]])


def prompts(path: Path, by: Tokenizer, *, length: int, wanted: int, seed: int) -> list[list[int]]:
    """Return up to `wanted` prompts of exactly `length` tokens, in an order that `seed` decides.

    What the tokenizer puts before a text is part of each.

    JSON Lines with a `prompt` field: longer prompts are cut, shorter ones left out. Anything else is prose: passages
    that don't overlap, of its start: four times as many as wanted to choose from.

    Raises:
        InputMissingError: Not one prompt is long enough, or a line isn't {"prompt": "…"}.
    """
    import numpy as np

    text, first = read(path), tokenizer.opening(by)
    own = max(1, length - len(first))
    candidates = [encode(prompt, by, at_least=own).tokens for prompt in prompt_fields(path, text)]
    if not candidates:
        candidates = list(passages(encode(text, by, at_least=4 * wanted * own).tokens, own))
    fitting = [[*first, *tokens.tolist()][:length] for tokens in candidates if len(tokens) >= own]
    if not fitting:
        longest = len(first) + max(len(tokens) for tokens in candidates)
        message = f"no prompt of {path} has {length} tokens; the longest has {longest}"
        raise InputMissingError(message, fix=f"set prompt_tokens to {longest} or less, or give longer prompts")
    order = np.random.default_rng(seed).permutation(len(fitting))[:wanted]
    return [fitting[index] for index in order]


def passages(tokens: NDArray[np.int64], length: int) -> Iterator[NDArray[np.int64]]:
    """Yield pieces of a text that don't overlap; the last one may be shorter."""
    return (tokens[start : start + length] for start in range(0, len(tokens), length))


FEWEST_PROMPTS = 4
"""Two to choose on, two to judge."""
MOST_PROMPTS = 20_000
"""Prompts to use of a large file, drawn by the seed; of prose, passages of its start."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """Prompts as tokens, in an order that the seed decides: those that judge, and all others, disjoint."""

    judged: list[NDArray[np.int64]]
    others: list[NDArray[np.int64]]


def divided(
    path: Path,
    by: Tokenizer,
    encode_prompt: Callable[[str], NDArray[np.int64]],
    *,
    eval_prompts: int,
    template: str,
    length: int,
    seed: int,
    eval_part: tuple[float, float] = (0.0, 1.0),
) -> Division:
    """Divide all prompts of a file: what learns from the others has never seen those that judge.

    Args:
        path: JSON Lines, a JSON array, or prose, whose passages don't overlap.
        by: Cuts prose into passages, and opens them as it opens texts.
        encode_prompt: Encodes a prompt, with a chat's markup where that is wanted.
        eval_prompts: Prompts to evaluate on; two thirds of all at most.
        template: As in `prompt_fields`.
        length: Tokens of a passage.
        seed: Decides which are which.
        eval_part: Share of the file, by prompts, that those which judge are drawn from; the others then come from
            the rest of it only.

    Raises:
        InputMissingError: Too few prompts, or a record that isn't one.
    """
    import numpy as np

    text = read(path)
    lines = list(prompt_fields(path, text, template))
    found = [] if lines else _opened_passages(text, by, length)
    known = len(lines or found)
    if known < FEWEST_PROMPTS:
        message = f"{path} has {known} prompts; {FEWEST_PROMPTS} are needed"
        raise InputMissingError(message, fix="give more prompts: half of them choose, the other half judge")
    order = np.random.default_rng(seed).permutation(known)[:MOST_PROMPTS]
    first, last = (int(known * edge) for edge in eval_part)
    inside = order[(order >= first) & (order < last)]
    apart = len(inside) < len(order)
    if len(inside) < FEWEST_PROMPTS:
        message = f"{len(inside)} of the {known} prompts of {path} are in eval_part {list(eval_part)}"
        raise InputMissingError(message, fix=f"widen it: {FEWEST_PROMPTS} are needed")
    count = min(eval_prompts, len(inside) if apart else max(FEWEST_PROMPTS, 2 * len(order) // 3))
    others = order[(order < first) | (order >= last)] if apart else order[count:]

    def encoded(index: int) -> NDArray[np.int64]:
        return encode_prompt(lines[index]) if lines else found[index]

    return Division(judged=[encoded(index) for index in inside[:count]], others=[encoded(index) for index in others])


def _opened_passages(text: str, by: Tokenizer, length: int) -> list[NDArray[np.int64]]:
    """Return passages of prose of exactly `length` tokens, with what the tokenizer puts before a text."""
    import numpy as np

    first = tokenizer.opening(by)
    own = max(1, length - len(first))
    tokens = encode(text, by, at_least=MOST_PROMPTS * own).tokens[: MOST_PROMPTS * own]
    return [np.array([*first, *each], np.int64) for each in passages(tokens, own) if len(each) == own]


def prompt_fields(path: Path, text: str, template: str = "") -> Iterator[str]:
    """Yield the prompts of JSON Lines or of a JSON array; nothing where the text is prose: no object at its start.

    Args:
        path: For messages.
        text: Of the file.
        template: How a prompt is made of a record's fields, "{context} {question}"; empty is its field `prompt`.

    Raises:
        InputMissingError: A record lacks a field, or one of them isn't text.
    """
    for number, entry in records.parse(text, path):
        found = (
            records.filled(entry, template) if template else entry.get("prompt") if isinstance(entry, dict) else None
        )
        if not isinstance(found, str) or not found:
            wanted = f"the fields of {template!r}" if template else '{"prompt": "…"}'
            message = f"{path}:{number}: expected {wanted}, got {json.dumps(entry)[:60]}"
            fix = "every record of a prompt file is an object with a `prompt`, or with the fields that `template` names"
            raise InputMissingError(message, fix=fix)
        yield found
