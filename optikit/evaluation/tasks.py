"""Tasks with right answers: multiple choice by log-likelihood, questions by exact match, SQL by its rows.

Choices are scored as lm-evaluation-harness scores them: the log-likelihood of " " + choice after the prompt, tokenized
together; `acc` takes the likeliest choice, `acc_norm` the likeliest per character. The prompt is read once and its
key-value cache serves all choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optikit.errors import InputMissingError
from optikit.evaluation import perplexity
from optikit.evaluation.sql import Outcome, Sandbox
from optikit.evaluation.task_items import DELIMITER, Choice, Item, Query, Question
from optikit.runtime.decoder import Decoder

CHUNK = 256
"""Tokens per call while a prompt is read."""


class NotFiniteError(ValueError):
    """A runtime returned NaN or infinity where an answer depends on it."""


class Tokenizer(Protocol):
    """What a task asks of a tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Return token ids, without special tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a model made of a multiple-choice item.

    Attributes:
        loglikelihoods: Of every choice, nats.
        choice, choice_norm: The likeliest, and the likeliest per character.
        correct, correct_norm: Whether that is the answer.
    """

    id: str
    loglikelihoods: tuple[float, ...]
    choice: int
    choice_norm: int
    correct: bool
    correct_norm: bool


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a model wrote: its text up to the stop, its length in tokens, whether it is right, and why a query isn't."""

    id: str
    text: str
    tokens: int
    correct: bool
    reason: str = ""


def split_pair(tokenizer: Tokenizer, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenize prompt and continuation together and split them; blanks that end the prompt go to the continuation."""
    blanks = len(prompt) - len(prompt.rstrip())
    if blanks:
        prompt, continuation = prompt[:-blanks], prompt[-blanks:] + continuation
    whole, head = list(tokenizer.encode(prompt + continuation)), list(tokenizer.encode(prompt))
    return head, whole[len(head) :]


def choose(decoder: Decoder, tokenizer: Tokenizer, item: Choice, *, start_token: int) -> Chosen:
    """Score every choice of an item; an empty prompt is `start_token` alone.

    Raises:
        InputMissingError: Prompt and choice together exceed the model's context.
        NotFiniteError: The model returned NaN or infinity.
    """
    reader = _Reader(decoder, item.id)
    found = pairs(tokenizer, item, start_token=start_token)
    return chosen(item, tuple(reader.loglikelihood(head, tail) for head, tail in found))


def pairs(tokenizer: Tokenizer, item: Choice, *, start_token: int) -> list[tuple[list[int], list[int]]]:
    """Return for every choice what is read before it, which is `start_token` where the prompt is empty, and its own."""
    found = (split_pair(tokenizer, item.prompt, DELIMITER + choice) for choice in item.choices)
    return [(head or [start_token], tail) for head, tail in found]


def chosen(item: Choice, likelihoods: tuple[float, ...]) -> Chosen:
    """Return which choice has the highest log-likelihood, nats, of each.

    Raises:
        NotFiniteError: One is NaN or infinite.
    """
    if not np.isfinite(likelihoods).all():
        raise NotFiniteError(f"a log-likelihood of item {item.id} is not a finite number")
    lengths = [len(choice) for choice in item.choices]
    best = int(np.argmax(likelihoods))
    best_norm = int(np.argmax(np.array(likelihoods) / lengths))
    return Chosen(
        id=item.id,
        loglikelihoods=likelihoods,
        choice=best,
        choice_norm=best_norm,
        correct=best == item.answer,
        correct_norm=best_norm == item.answer,
    )


class _Reader:
    """Log-likelihoods of continuations of one prompt: the prompt stays in the decoder's cache."""

    def __init__(self, decoder: Decoder, item: str) -> None:
        self._decoder = decoder
        self._item = item
        self._head: list[int] = []
        self._after: NDArray[np.float32] = np.empty(0, np.float32)
        """Logits (1, vocab) after the prompt."""

    def loglikelihood(self, head: list[int], tail: list[int]) -> float:
        """Return ln p(tail | head), nats."""
        _require_fit(self._decoder, len(head) + len(tail), self._item)
        if head != self._head:
            self._head, self._after = head, _last_logits(self._decoder, np.array(head, np.int64))
        rows = self._after
        if len(tail) > 1:
            more = self._decoder.forward(np.array(tail[:-1], np.int64), len(head))
            rows = np.concatenate([rows, more])
        return -float(perplexity.token_nll(rows, np.array(tail, np.int64)).sum())


def _last_logits(decoder: Decoder, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the logits (1, vocab) after `tokens`, read in chunks: all logits of a long prompt would fill memory."""
    last = np.empty((0, decoder.vocab), np.float32)
    for start in range(0, len(tokens), CHUNK):
        last = decoder.forward(tokens[start : start + CHUNK], start)[-1:].copy()
    return last


def _require_fit(decoder: Decoder, tokens: int, item: str) -> None:
    if tokens > decoder.max_tokens:
        message = f"item {item} needs {tokens} tokens, and the model's context holds {decoder.max_tokens}"
        raise InputMissingError(message, fix="shorten its prompt")


def answer(
    decoder: Decoder,
    tokenizer: Tokenizer,
    item: Question | Query,
    *,
    sandbox: Sandbox,
    max_tokens: int = 64,
    stop: Sequence[str] = ("\n",),
    end_tokens: frozenset[int] = frozenset(),
) -> Answered:
    """Write greedily until a stop text, an end token, or `max_tokens`; right if one of the answers is what came.

    Blanks are compared loosely (ends stripped, runs as one), letters exactly. A query is right if it returns the rows
    of the right one.

    Raises:
        InputMissingError: Prompt and answer together exceed the model's context, or an item's own SQL fails.
    """
    prompt = list(tokenizer.encode(item.prompt))
    _require_fit(decoder, len(prompt) + max_tokens, item.id)
    written: list[int] = []
    text = ""
    for token in decoder.greedy(np.array(prompt, np.int64), max_tokens):
        if token in end_tokens:
            break
        written.append(token)
        text = tokenizer.decode(written)
        if any(mark in text for mark in stop):
            break
    for mark in stop:
        text = text.split(mark, 1)[0]
    outcome = _outcome(item, text, sandbox)
    return Answered(id=item.id, text=text, tokens=len(written), correct=outcome.correct, reason=outcome.reason)


def _outcome(item: Question | Query, text: str, sandbox: Sandbox) -> Outcome:
    if isinstance(item, Question):
        return Outcome(correct=_normal(text) in {_normal(each) for each in item.answers})
    try:
        return sandbox.same_result(item.schema, item.answer, text)
    except ValueError as error:
        raise InputMissingError(f"item {item.id}: {error}", fix="correct its `schema` and `answer`") from error


def require_sound(items: Sequence[Item], sandbox: Sandbox) -> None:
    """Run the SQL that items bring along, before a model has written anything.

    Raises:
        InputMissingError: It fails.
    """
    for item in items:
        if isinstance(item, Query):
            _outcome(item, item.answer, sandbox)


def _normal(text: str) -> str:
    return " ".join(text.split())
