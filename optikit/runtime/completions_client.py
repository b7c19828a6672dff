"""A client of servers that speak OpenAI's completions API.

Streamed completions with the time of every piece, and the log-probabilities of a prompt where the server echoes them.
Standard library only: a load test's client is small.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from optikit.errors import StageTimeoutError, UnavailableError, UsageError

QUOTED = 200
"""Characters of a server's answer that an error message quotes."""
MOST_BYTES = 64 * 2**20
"""Longest answer that is read."""
NUMBERED = "token_id:"
"""What vLLM writes before a token's number where it is asked for numbers."""
Prompt = str | Sequence[int]
"""A text, or tokens where a server takes them."""


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """One streamed completion: when it was called, when each non-empty piece came, and what the server counted."""

    start_ns: int
    piece_ns: tuple[int, ...]
    prompt_tokens: int | None
    output_tokens: int | None

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
    """A server's completions endpoint.

    Args:
        url: Base address, with or without `/v1`.
        timeout_s: Seconds without a byte after which the server counts as hung.
        key: API key, sent as a bearer token; "" is none. Never part of a message.

    Raises:
        UsageError: Not an http or https address.
    """

    def __init__(self, url: str, *, timeout_s: float, key: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no http or https address", fix="write http://HOST:PORT/v1")
        port = f":{parts.port}" if parts.port else ""
        self.url = f"{parts.scheme}://{parts.hostname}{port}{parts.path}"  # no user, password or query: it is printed
        self.parts = parts
        path = parts.path.rstrip("/")
        self.base = path if path.endswith("/v1") else f"{path}/v1"
        self.timeout_s = timeout_s
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def models(self) -> tuple[str, ...]:
        """Return the models that the server offers.

        Raises:
            UnavailableError: It can't be reached, drops the connection, or answers anything but a list.
            StageTimeoutError: It hangs.
        """
        with _Exchange(self, "GET", "/models") as answer:
            listed = answer.json()
        rows = listed.get("data") if isinstance(listed, dict) else None
        names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        found = tuple(name for name in names if isinstance(name, str))
        if not found:
            raise UnavailableError(f"{self.url} lists no models", fix="name one with --model")
        return found

    def stream(self, model: str, prompt: Prompt, new_tokens: int, *, extra: Mapping[str, Any]) -> Streamed:
        """Complete a prompt greedily, streamed; errors as `models`, and `Refused` where it doesn't take a parameter."""
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        request = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
        start = time.perf_counter_ns()
        pieces: list[int] = []
        usage: Mapping[str, Any] = {}
        with _Exchange(self, "POST", "/completions", {**request, **extra}) as answer:
            for event in answer.events():
                usage = event.get("usage") or usage
                if any(choice.get("text") or choice.get("token_ids") for choice in event.get("choices") or ()):
                    pieces.append(time.perf_counter_ns())
        if len(pieces) < 2:
            message = f"{self.url} streamed {len(pieces)} pieces of {new_tokens} tokens: nothing to time"
            raise UnavailableError(message, fix="see that it streams, and that the prompt doesn't end the text")
        prompted, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        return Streamed(
            start_ns=start,
            piece_ns=tuple(pieces),
            prompt_tokens=prompted if isinstance(prompted, int) else None,
            output_tokens=written if isinstance(written, int) and written > 0 else None,
        )

    def tokens(self, model: str, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Yield exactly `new_tokens` greedy tokens after a prompt, each when it comes; the end of a text is ignored.

        Only servers that tell numbers of tokens, as vLLM does. Errors as `stream`.
        """
        request = {"model": model, "prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0, "stream": True}
        request |= {"ignore_eos": True, "return_token_ids": True}
        count = 0
        with _Exchange(self, "POST", "/completions", request) as answer:
            for event in answer.events():
                for choice in event.get("choices") or ():
                    for token in choice.get("token_ids") or ():
                        count += 1
                        yield int(token)
        if count != new_tokens:
            message = f"{self.url} told {count} tokens of {new_tokens}"
            raise UnavailableError(message, fix="ask a server that takes `return_token_ids` and `ignore_eos`")

    def prompt_logprobs(self, model: str, prompt: str) -> Echo | None:
        """Return ln p of every token of a prompt but the first; None where the server doesn't echo them."""
        request = {"model": model, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        try:
            with _Exchange(self, "POST", "/completions", request) as answer:
                found = answer.json()
        except RefusedByServerError:
            return None
        try:
            told = found["choices"][0]["logprobs"]
            values, tokens = told["token_logprobs"], told.get("tokens")
        except (KeyError, IndexError, TypeError, AttributeError):
            return None
        numbers = values[1:] if isinstance(values, list) else []
        if not numbers or not all(map(_is_number, numbers)):
            return None
        first = tokens[0] if isinstance(tokens, list) and tokens and isinstance(tokens[0], str) else ""
        return Echo(logprobs=tuple(map(float, numbers)), scored_bytes=len(prompt.encode()) - len(first.encode()))

    def token_logprobs(self, model: str, tokens: Sequence[int]) -> TokenEcho | None:
        """Return ln p of every token of a prompt but the first, and the likeliest one in its place.

        None where the server doesn't echo them by number; vLLM does.
        """
        request = {"model": model, "prompt": list(tokens), "max_tokens": 0, "echo": True, "logprobs": 1}
        try:
            wanted = {**request, "temperature": 0, "return_tokens_as_token_ids": True}
            with _Exchange(self, "POST", "/completions", wanted) as answer:
                found = answer.json()
            told = found["choices"][0]["logprobs"]
            echoed = [int(each.removeprefix(NUMBERED)) for each in told["tokens"]]
            numbers = told["token_logprobs"][1 : len(tokens)]
            best = [max(each.items(), key=lambda pair: pair[1])[0] for each in told["top_logprobs"][1 : len(tokens)]]
            likeliest = tuple(int(each.removeprefix(NUMBERED)) for each in best)
        except (RefusedByServerError, KeyError, IndexError, TypeError, AttributeError, ValueError):
            return None
        if echoed[: len(tokens)] != list(tokens) or not numbers or not all(map(_is_number, numbers)):
            return None
        return TokenEcho(logprobs=tuple(map(float, numbers)), top1=likeliest)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class RefusedByServerError(UnavailableError):
    """The server answered that the request is wrong (400 to 422): most often it doesn't know a parameter."""


class _Exchange:
    """One request with its answer; whatever goes wrong in between becomes an error that says so."""

    def __init__(self, client: Client, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        self._client = client
        parts = client.parts
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname or "", parts.port, timeout=client.timeout_s)
        self._response: http.client.HTTPResponse | None = None
        self._what = f"{method} {client.base}{path}"
        self._request = (method, client.base + path, json.dumps(body) if body is not None else None)

    def __enter__(self) -> Self:
        method, path, body = self._request
        try:
            self._connection.request(method, path, body, self._client.headers)
            self._response = self._connection.getresponse()
            if self._response.status != http.HTTPStatus.OK:
                raise self._refusal(self._response.status, self._response.read(MOST_BYTES))
        except (OSError, http.client.HTTPException) as error:
            self._close()
            raise self._failure(error) from error
        except UnavailableError:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._response is not None:
            self._response.close()  # it may own the socket
        self._connection.close()

    def json(self) -> Any:
        """Return the whole answer."""
        return self._parsed(self._read())

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream up to [DONE]."""
        while line := self._line():
            name, _, data = line.decode("utf-8", "replace").strip().partition(":")
            if name != "data":
                continue
            if data.strip() == "[DONE]":
                return
            event = self._parsed(data.strip().encode())
            if not isinstance(event, dict):
                raise self._nonsense(data.encode())
            if event.get("error"):
                raise self._failed(f"failed in the middle of its answer: {str(event['error'])[:QUOTED]}")
            yield event
        raise self._failed("dropped the connection in the middle of its answer")

    def _read(self) -> bytes:
        return self._received(lambda response: response.read(MOST_BYTES))

    def _line(self) -> bytes:
        return self._received(lambda response: response.readline(MOST_BYTES))

    def _received(self, get: Callable[[http.client.HTTPResponse], bytes]) -> bytes:
        if self._response is None:
            return b""
        try:
            return get(self._response)
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error) from error

    def _parsed(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError:
            raise self._nonsense(data) from None

    def _nonsense(self, data: bytes) -> UnavailableError:
        return self._failed(f"answered something else than JSON: {_quoted(data)}")

    def _refusal(self, status: int, data: bytes) -> UnavailableError:
        message = f"{self._client.url}: {self._what} answered {status}: {_quoted(data)}"
        if status in (400, 404, 422):
            return RefusedByServerError(message, fix="check the address and --model")
        if status in (401, 403):
            return UnavailableError(message, fix="name the variable that holds its API key: --key-from VARIABLE")
        return UnavailableError(message, fix="look at the server's log")

    def _failed(self, what: str) -> UnavailableError:
        return UnavailableError(f"{self._client.url}: {self._what}: the server {what}", fix="look at the server's log")

    def _failure(self, error: OSError | http.client.HTTPException) -> StageTimeoutError | UnavailableError:
        if isinstance(error, TimeoutError):
            message = f"{self._client.url}: {self._what}: nothing came for {self._client.timeout_s:g} s"
            return StageTimeoutError(message, fix="raise --timeout, or look at what the server does")
        if isinstance(error, ConnectionRefusedError | socket.gaierror):
            return UnavailableError(f"{self._client.url} can't be reached: {error}", fix="start it, check the address")
        return self._failed(f"dropped the connection ({type(error).__name__})")


def _quoted(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip()[:QUOTED] or "nothing"
