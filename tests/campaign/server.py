"""A hostile OpenAI-compatible server on this machine, for one command."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from random import Random
from typing import Any

from tests.campaign.values import VALUES, changed

LASTS_S = 20.0
"""Seconds that an endless answer goes on: longer than any command waits for it."""
ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
EVENT = b'data: {"choices":[{"text":"x"}]}\n\n'


def _whole(value: Any, headers: bytes = b"") -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n" + headers
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _stream(events: Iterable[Any]) -> bytes:
    lines = (each if isinstance(each, bytes) else json.dumps(each).encode() for each in events)
    return ENDLESS + b"".join(b"data: " + line + b"\n\n" for line in lines)


MODELS: Any = {"data": [{"id": "m"}]}
PIECES: list[Any] = [{"choices": [{"text": "a"}]}] * 3
COUNTS: list[Any] = [{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}]
ECHO: Any = {"choices": [{"logprobs": {"tokens": ["a", "b", "c"], "token_logprobs": [None, -1.0, -2.0]}}]}
GOOD = {"models": _whole(MODELS), "stream": _stream([*PIECES, *COUNTS, b"[DONE]"]), "echo": _whole(ECHO)}


def _malformed(which: str, random: Random) -> bytes:
    """Return an answer whose JSON is another than the API's."""
    if which == "stream":
        made = changed([*PIECES, *COUNTS], random, random.choice([1, 2]))
        return _stream([*made, b"[DONE]"] if isinstance(made, list) else [made])
    return _whole(changed(MODELS if which == "models" else ECHO, random, random.choice([1, 2])))


def _broken(_: str, random: Random) -> bytes:
    """Return an answer that isn't HTTP, or isn't what its head says."""
    return random.choice(
        [
            *(b"", b"\x00\xff\x1b[31m garbage\r\n\r\n", b"HTTP/1.1 200 " + b"A" * 200_000 + b"\r\n\r\n"),
            b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(2000)) + b"\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
            *(b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\nx" % size for size in (b"-5", b"9" * 40, b"10")),
            *(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\nx\r\n" % n for n in (b"ZZ", b"f" * 18)),
            b"HTTP/1.1 500 no\r\nContent-Length: 60\r\n\r\n\x1b[2J\x1b]0;owned\x07\n::error::owned\n\xe2\x80\xae"
            + b" " * 60,
            b"HTTP/1.1 302 x\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 301 x\r\nLocation: /v1/models\r\nContent-Length: 0\r\n\r\n",
            _whole(b"[" * 200_000),
            _whole(gzip.compress(bytes(100_000_000), 1), b"Content-Encoding: gzip\r\n"),
            _whole(b"<script>alert(1)</script>"),
            _stream([b"not json \x1b[31m", b"[" * 100_000, {"error": {"message": "x\n::error::owned"}}]),
            _stream([]),
            b"HTTP/1.1 100 Continue\r\n\r\n" * 5000,
        ]
    )


def _forever(_: str, random: Random) -> Iterable[bytes]:
    """Yield an answer that doesn't end."""
    head, piece, pause = random.choice(
        [
            *((ENDLESS, EVENT, 0.01), (ENDLESS, EVENT * 1000, 0.0), (ENDLESS, b": ping\n\n", 0.2)),
            *((ENDLESS + b"data: ", b"x" * 65536, 0.0), (b"HTTP/1.1 200 OK\r\n", b"X", 0.3), (b"", b"", 0.5)),
            (b'HTTP/1.1 200 OK\r\n\r\n{"data":[{"id":"', b"m" * 65536, 0.0),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" ", 0.3),
        ]
    )
    yield head
    end = time.monotonic() + LASTS_S
    while time.monotonic() < end:
        yield piece
        time.sleep(pause)


class Server:
    """Answers one of its three kinds of question wrongly, the others right.

    Attributes:
        url: Where it is.
        stop: Ends it.
    """

    def __init__(self, random: Random) -> None:
        self._random, self._wrong = random, random.choice(["models", "stream", "stream", "echo"])
        self._how: Callable[[str, Random], Any] = random.choice([_malformed, _malformed, _broken, _forever])
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        self.stop = self._listening.close
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(LASTS_S)
            asked = self._asked(connection)
            answer = self._how(asked, self._random) if asked == self._wrong else GOOD[asked]
            for piece in [answer] if isinstance(answer, bytes) else answer:
                connection.sendall(piece)

    @staticmethod
    def _asked(connection: socket.socket) -> str:
        said = b""
        while b"\r\n\r\n" not in said and (more := connection.recv(65536)):
            said += more
        head, _, body = said.partition(b"\r\n\r\n")
        wanted = next((line.split(b":")[1] for line in head.lower().splitlines() if b"content-length" in line), b"0")
        while len(body) < int(wanted) and (more := connection.recv(65536)):
            body += more
        if b"/models" in head.splitlines()[0]:
            return "models"
        return "echo" if b'"echo"' in body else "stream"


def odd_url(random: Random, port: str) -> str:
    """Return an address that is none, or odd."""
    odd = ("http://127.0.0.1:99999/", "http://127.0.0.1:abc/", "http://[::1", "http://", "http://exa mple:1/")
    odd += (f"http://127.0.0.1:{port}/\r\nX-Evil: 1", f"http://user:s3cr3t@127.0.0.1:{port}/v1", "http://\u202e:1/")
    odd += (
        f"http://127.0.0.1:{port}/ü\x1b[31m",
        f"http://{'a' * 300}/",
        f"http://0x7f.1:{port}/",
        "https://127.0.0.1:1",
    )
    return random.choice([*odd, f"http://{random.choice(VALUES)}/".replace("\0", "")[:3000]])
