"""A client of servers that speak OpenAI's completions API.

Streamed completions with the time of every piece, and the log-probabilities of a prompt where the server echoes them.
What a server tells is checked before it becomes a figure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from optikit.errors import UnavailableError
from optikit.runtime.http_exchange import Answer, RefusedByServerError, Server

__all__ = ["Client", "Echo", "Prompt", "RefusedByServerError", "Streamed", "TokenEcho"]

TOKEN_ID_PREFIX = "token_id:"  # noqa: S105 - a token of text
"""What vLLM writes before a token's number where it is asked for numbers."""
PIECES_PER_TOKEN = 2
"""A stream of more pieces than this for each token asked for ignores `max_tokens`, and may never end."""
MOST_TOKENS = 2**31
"""No prompt has more tokens; a server that counts more is wrong."""
Prompt = str | Sequence[int]
"""A text, or tokens where a server takes them."""


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """One streamed completion: when it was called, when each non-empty piece came, and what the server counted.

    `text` is what came, `token_ids` its tokens where the server tells numbers.
    """

    start_ns: int
    piece_ns: tuple[int, ...]
    prompt_tokens: int | None
    output_tokens: int | None
    text: str = ""
    token_ids: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens written: as the server counted them, else pieces."""
        return self.output_tokens if self.output_tokens is not None else len(self.piece_ns)

    @property
    def ttft_ms(self) -> float:
        """Time to the first piece, ms."""
        return (self.piece_ns[0] - self.start_ns) / 1e6

    @property
    def tpot_ms(self) -> float:
        """Mean time per token after the first piece, ms; never the gap between pieces."""
        return (self.piece_ns[-1] - self.piece_ns[0]) / max(1, self.tokens - 1) / 1e6

    @property
    def e2e_ms(self) -> float:
        """Time from the call to the last piece, ms."""
        return (self.piece_ns[-1] - self.start_ns) / 1e6


@dataclass(frozen=True, kw_only=True)
class Echo:
    """Log-probabilities, nats, of the tokens of a prompt but the first, and the bytes of text that they stand for."""

    logprobs: tuple[float, ...]
    scored_bytes: int


@dataclass(frozen=True, kw_only=True)
class TokenEcho:
    """Of the tokens of a prompt but the first: log-probabilities, nats, and which token would have been likeliest."""

    logprobs: tuple[float, ...]
    top1: tuple[int, ...]


class Client:
    """A server's completions endpoint; its connections are closed at the end of a `with` block.

    Args:
        url: Base address, with or without `/v1`.
        timeout_s: Seconds for a connection, for the begin of an answer, for each next token, and for its end.
        key: API key, sent as a bearer token; "" is none. Never part of a message.

    Raises:
        UsageError: Not an http or https address.
    """

    def __init__(self, url: str, *, timeout_s: float, key: str = "") -> None:
        self._server = Server(url, timeout_s=timeout_s, key=key)
        self.url = self._server.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def models(self) -> tuple[str, ...]:
        """Return the models that the server offers.

        Raises:
            UnavailableError: It can't be reached, drops the connection, or answers anything but a list.
            StageTimeoutError: It hangs.
        """
        with self._server.exchange("GET", "/models") as answer:
            listed = answer.json()
        rows = listed.get("data") if isinstance(listed, dict) else None
        names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        found = tuple(name for name in names if isinstance(name, str))
        if not found:
            message = f"{self.url} lists no models: {self._server.quote(repr(listed))}"
            raise UnavailableError(message, fix="name one with --model")
        return found

    def stream(self, model: str, prompt: Prompt, new_tokens: int, *, extra: Mapping[str, Any]) -> Streamed:
        """Complete a prompt greedily, streamed.

        Raises:
            UnavailableError: As in `models`, or nothing to time came.
            RefusedByServerError: The server doesn't take a parameter.
            StageTimeoutError: It hangs.
        """
        start = time.perf_counter_ns()
        came = _Came()
        with self._server.exchange("POST", "/completions", {**_streamed(model, prompt, new_tokens), **extra}) as answer:
            for at, event in answer.events():
                if came.take(answer, at, event):
                    answer.expect("no next token came")
                if len(came.pieces) > PIECES_PER_TOKEN * new_tokens:
                    raise answer.failed(f"went on after {len(came.pieces)} pieces of {new_tokens} tokens")
            prompted, written = (_count(answer, came.usage, name) for name in ("prompt_tokens", "completion_tokens"))
            if written is not None and written > new_tokens:
                raise answer.malformed(f"{new_tokens} tokens", came.usage)
        if len(came.pieces) < 2:
            message = f"{self.url} streamed {len(came.pieces)} pieces of {new_tokens} tokens: nothing to time"
            raise UnavailableError(message, fix="see that it streams, and that the prompt doesn't end the text")
        return Streamed(
            start_ns=start,
            piece_ns=tuple(came.pieces),
            prompt_tokens=prompted,
            output_tokens=written or None,
            text="".join(came.text),
            token_ids=tuple(came.tokens),
        )

    def tokens(self, model: str, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Yield exactly `new_tokens` greedy tokens after a prompt, each when it comes; the end of a text is ignored.

        Only servers that tell numbers of tokens, as vLLM does. Errors as `stream`.
        """
        request = _streamed(model, prompt, new_tokens) | {"ignore_eos": True, "return_token_ids": True}
        count = 0
        with self._server.exchange("POST", "/completions", request) as answer:
            for _, event in answer.events():
                for choice in _choices(answer, event):
                    for token in _token_ids(answer, choice):
                        count += 1
                        yield token
                        answer.expect("no next token came")
                if count > new_tokens:
                    break
        if count != new_tokens:
            message = f"{self.url} told {count} tokens of {new_tokens}"
            raise UnavailableError(message, fix="ask a server that takes `return_token_ids` and `ignore_eos`")

    def prompt_logprobs(self, model: str, prompt: str) -> Echo | None:
        """Return ln p of every token of a prompt but the first; None where the server doesn't echo them.

        Raises:
            UnavailableError: As in `models`, or numbers that are no log-probabilities.
            StageTimeoutError: The server hangs.
        """
        request = {"model": model, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        try:
            with self._server.exchange("POST", "/completions", request) as answer:
                return _echo(answer, prompt)
        except RefusedByServerError:
            return None

    def token_logprobs(self, model: str, tokens: Sequence[int]) -> TokenEcho | None:
        """Return ln p of every token of a prompt but the first, and the likeliest one in its place.

        None where the server doesn't echo them by number; vLLM does. Errors as `prompt_logprobs`.
        """
        request = {"model": model, "prompt": list(tokens), "max_tokens": 0, "echo": True, "logprobs": 1}
        try:
            wanted = {**request, "temperature": 0, "return_tokens_as_token_ids": True}
            with self._server.exchange("POST", "/completions", wanted) as answer:
                return _token_echo(answer, tokens)
        except RefusedByServerError:
            return None


@dataclass
class _Came:
    """What came of a stream so far: when each non-empty piece did, its text and tokens, and what the server counted."""

    pieces: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)

    def take(self, answer: Answer, at: int, event: Mapping[str, Any]) -> bool:
        """Take note of an event; return whether it carries text or tokens."""
        self.usage = _usage(answer, event) or self.usage
        choices = _choices(answer, event)
        written = sum(_writes(answer, choice) for choice in choices) > 0  # all of them are checked
        if written:
            self.pieces.append(at)
        self.text += [choice.get("text") or "" for choice in choices]
        self.tokens += [token for choice in choices for token in _token_ids(answer, choice)]
        return written


def _streamed(model: str, prompt: Prompt, new_tokens: int) -> dict[str, Any]:
    prompt = prompt if isinstance(prompt, str) else list(prompt)
    return {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}


def _choices(answer: Answer, event: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of an event or an answer; none where it only tells usage."""
    choices = event.get("choices")
    if choices is None:
        return []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise answer.malformed("choices", choices)
    return choices


def _writes(answer: Answer, choice: Mapping[str, Any]) -> bool:
    """Tell whether a choice carries text or tokens."""
    written = choice.get("text")
    if not isinstance(written, str | None):
        raise answer.malformed("a text", written)
    return bool(written or _token_ids(answer, choice))


def _token_ids(answer: Answer, choice: Mapping[str, Any]) -> list[int]:
    tokens = choice.get("token_ids") or []
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < MOST_TOKENS for token in tokens):
        raise answer.malformed("token numbers", tokens)
    return tokens


def _usage(answer: Answer, event: Mapping[str, Any]) -> Mapping[str, Any]:
    usage = event.get("usage") or {}
    if not isinstance(usage, dict):
        raise answer.malformed("a usage", usage)
    return usage


def _count(answer: Answer, usage: Mapping[str, Any], name: str) -> int | None:
    count = usage.get(name)
    if count is None or (type(count) is int and 0 <= count < MOST_TOKENS):
        return count
    raise answer.malformed(f"a number of {name}", count)


def _logprobs(answer: Answer) -> Mapping[str, Any] | None:
    """Return the log-probabilities of the only choice; None where there are none."""
    found = answer.json()
    choices = _choices(answer, found) if isinstance(found, dict) else []
    if not choices:
        raise answer.malformed("an answer", found)
    told = choices[0].get("logprobs")
    if not isinstance(told, dict | None):
        raise answer.malformed("log-probabilities", told)
    return told


def _numbers(answer: Answer, values: object) -> tuple[float, ...]:
    """Return log-probabilities, nats, but for the first token's, which has none."""
    if not isinstance(values, list):
        raise answer.malformed("log-probabilities", values)
    for value in values[1:]:
        if type(value) not in (int, float) or not -sys.float_info.max <= value <= 0:
            raise answer.malformed("a log-probability", value)
    return tuple(map(float, values[1:]))


def _tokens(answer: Answer, told: Mapping[str, Any], count: int) -> list[str]:
    """Return the texts of the tokens that were scored; none where the server doesn't tell them."""
    tokens = told.get("tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise answer.malformed("tokens", tokens)
    if tokens and len(tokens) != count:
        raise answer.malformed(f"{count} log-probabilities of {len(tokens)} tokens", tokens)
    return tokens


def _echo(answer: Answer, prompt: str) -> Echo | None:
    told = _logprobs(answer)
    if told is None or not told.get("token_logprobs"):
        return None
    numbers = _numbers(answer, told["token_logprobs"])
    tokens = _tokens(answer, told, len(numbers) + 1)
    first = tokens[0] if tokens and prompt.startswith(tokens[0]) else ""  # a token that begins every text is not of it
    scored = len(prompt.encode()) - len(first.encode())
    if not numbers:
        return None
    if scored <= 0:
        raise answer.malformed("a first token that is the whole prompt", tokens)
    return Echo(logprobs=numbers, scored_bytes=scored)


def _token_echo(answer: Answer, tokens: Sequence[int]) -> TokenEcho | None:
    told = _logprobs(answer)
    if told is None:
        return None
    try:
        echoed = [int(each.removeprefix(TOKEN_ID_PREFIX)) for each in told["tokens"]]
        best = [max(each.items(), key=lambda pair: pair[1])[0] for each in told["top_logprobs"][1 : len(tokens)]]
        likeliest = tuple(int(each.removeprefix(TOKEN_ID_PREFIX)) for each in best)
        values = told["token_logprobs"][: len(tokens)]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return None
    numbers = _numbers(answer, values)
    if echoed[: len(tokens)] != list(tokens) or not numbers:
        return None
    return TokenEcho(logprobs=numbers, top1=likeliest)
