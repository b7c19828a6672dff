"""The shapes of answers: whole ones, chunks of streams, and log-probabilities as either API tells them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optikit.serving.completion import Piece, Rated

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from optikit.serving.openai_api import Sampled

LEAST = -9999.0
"""JSON has no infinity: what an impossible token's log-probability is told as."""


def usage(prompt: int, written: int) -> dict[str, int]:
    """Return what a request cost, in tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def failure(message: str, *, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """Return the body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Shape:
    """One of the two APIs' way to say an answer.

    Args:
        name: The answer's id.
        model: Which model writes it.
        asked: What the client said.
        by: The tokenizer.
        echoed: Of each choice, the text of its prompt that is to be told before the answer.
    """

    whole = "text_completion"
    chunk = "text_completion"

    def __init__(self, name: str, model: str, asked: Sampled, by: Tokenizer, echoed: Sequence[str] = ()) -> None:
        self._about = {"id": name, "created": int(time.time()), "model": model}
        self._asked, self._by = asked, by
        self._echoed = dict(enumerate(echoed))
        self._offsets: dict[int, int] = {}

    def answer(self, pieces: Iterable[Piece], cost: Mapping[str, int]) -> dict[str, Any]:
        """Return a whole answer; each piece is a whole choice."""
        choices = [self.choice(each) for each in pieces]
        return {**self._about, "object": self.whole, "choices": choices, "usage": cost}

    def event(self, pieces: Sequence[Piece], cost: Mapping[str, int] | None) -> dict[str, Any]:
        """Return a chunk of a stream; without pieces it tells only the cost."""
        told = {} if cost is None else {"usage": cost}
        return {**self._about, "object": self.chunk, "choices": [self.delta(each) for each in pieces], **told}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """Return a choice of an answer."""
        text = self._echoed.pop(piece.choice, "") + piece.text
        told = {"index": piece.choice, "text": text, "finish_reason": piece.finish}
        return {**told, "logprobs": self._logprobs(piece), **self._ids(piece)}

    def delta(self, piece: Piece) -> dict[str, Any]:
        """Return a choice of a chunk."""
        return self.choice(piece)

    def opening(self, _choices: int) -> list[dict[str, Any]]:
        """Return the chunks that come before any text."""
        return []

    def _ids(self, piece: Piece) -> dict[str, Any]:
        return {"token_ids": list(piece.tokens)} if self._asked.return_token_ids else {}

    def _token(self, token: int) -> str:
        if self._asked.return_tokens_as_token_ids:
            return f"token_id:{token}"
        text: str = self._by.decode([token], skip_special_tokens=False)
        return text

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """Return what completions call `logprobs`: columns."""
        if self._asked.told is None:
            return None
        rated = (*piece.prompt, *piece.rated)
        tokens = [self._token(each.token) for each in rated]
        offset = self._offsets.get(piece.choice, 0)
        offsets = []
        for text in tokens:
            offsets.append(offset)
            offset += len(text)
        self._offsets[piece.choice] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [None if each.logprob is None else max(each.logprob, LEAST) for each in rated],
            "top_logprobs": [
                None if each.logprob is None else {self._token(one): max(value, LEAST) for one, value in each.best}
                for each in rated
            ],
            "text_offset": offsets,
        }


class ChatShape(Shape):
    """Chat completions."""

    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, piece: Piece) -> dict[str, Any]:
        """Return a choice of an answer."""
        message = {"role": "assistant", "content": piece.text}
        told = {"index": piece.choice, "message": message, "finish_reason": piece.finish}
        return {**told, "logprobs": self._logprobs(piece), **self._ids(piece)}

    def delta(self, piece: Piece) -> dict[str, Any]:
        """Return a choice of a chunk."""
        told = {"index": piece.choice, "delta": {"content": piece.text}, "finish_reason": piece.finish}
        return {**told, "logprobs": self._logprobs(piece), **self._ids(piece)}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return the chunk that says who speaks."""
        delta = {"role": "assistant", "content": ""}
        told = [{"index": i, "delta": delta, "finish_reason": None, "logprobs": None} for i in range(choices)]
        return [{**self._about, "object": self.chunk, "choices": told}]

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """Return what chats call `logprobs`: a list."""
        if self._asked.told is None:
            return None
        return {"content": [self._rated(each) for each in piece.rated], "refusal": None}

    def _rated(self, each: Rated) -> dict[str, Any]:
        best = [self._pair(token, value) for token, value in each.best]
        return {**self._pair(each.token, each.logprob or 0.0), "top_logprobs": best}

    def _pair(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(text.encode())}
