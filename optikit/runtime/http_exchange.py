"""One HTTP request to a server that nobody vouches for: each phase of the answer is bounded in time and in bytes.

httpcore2, the engine of httpx2, speaks HTTP here without the layer above it: nothing is unpacked, redirected or read
from the environment, and its sockets take a deadline. A timeout of a single read isn't enough, because a server that
sends one byte now and then would be waited for without end.
"""

from __future__ import annotations

import json
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpcore2

from optikit import text
from optikit.errors import StageTimeoutError, UnavailableError, UsageError

QUOTED = 200
"""Characters of a server's answer that an error message quotes."""
MOST_BYTES = 64 * 2**20
"""Longest answer that is read."""
MOST_LINE_BYTES = 2**20
"""Longest line of a stream; one carries a few tokens."""
KEPT_S = 4.0
"""Seconds that an unused connection is kept: uvicorn, under vLLM and others, closes it after 5."""
ENDING_S = 0.25
"""Seconds that a stream may take to end after it said [DONE]; else its connection isn't used again."""


class RefusedByServerError(UnavailableError):
    """The server answered that the request is wrong (400 to 422): most often it doesn't know a parameter."""


class Server:
    """An address with its credentials, and the connections to it that are free.

    Args:
        url: Base address, with or without `/v1`. User, password and query are neither sent nor told.
        timeout_s: Seconds for each phase of an answer.
        key: API key, sent as a bearer token; "" is none. Never part of a message.

    Attributes:
        url: The address as it may be printed.
        base: The same with `/v1`.

    Raises:
        UsageError: Not an http or https address, or a key that no header can carry.
    """

    def __init__(self, url: str, *, timeout_s: float, key: str = "") -> None:
        parts, port = _split(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        self.url = f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"
        self.base = self.url.rstrip("/") if parts.path.rstrip("/").endswith("/v1") else f"{self.url.rstrip('/')}/v1"
        self.timeout_s = timeout_s
        if not (key.isascii() and (key.isprintable())):
            raise UsageError("the API key has characters that no HTTP header can carry", fix="look for a line break")
        self.headers: dict[bytes | str, bytes | str] = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
        }
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self._key = key
        self._free: deque[_Line] = deque()

    @contextmanager
    def exchange(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[Answer]:
        """Send a request; the block reads its answer.

        Raises:
            UnavailableError: The server can't be reached, drops the connection, or answers something else.
            RefusedByServerError: It answers 400, 404 or 422.
            StageTimeoutError: A phase takes longer than `timeout_s`.
        """
        line = self._free.pop() if self._free else _Line()
        answer = Answer(self, line, f"{method} {self._path(path)}")
        try:
            content = json.dumps(body).encode() if body is not None else None
            answer.expect("no answer began")
            with line.pool.stream(method, self.base + path, headers=self.headers, content=content) as response:
                answer.open(response)
                yield answer
        except httpcore2.TimeoutException as error:
            raise answer.late() from error
        except (httpcore2.ConnectError, UnicodeError) as error:  # no such name, nobody there, a bad certificate
            message = f"{self.url} can't be reached: {self.quote(str(error))}"
            raise UnavailableError(message, fix="start it, check the address") from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            dropped = f"dropped the connection ({self.quote(str(error)) or type(error).__name__})"
            raise answer.failed(dropped) from error
        finally:
            self._free.append(line)

    def close(self) -> None:
        """Close the connections that are kept."""
        while self._free:
            self._free.pop().pool.close()

    def quote(self, told: str | bytes) -> str:
        """Return what a server said as one short line without control characters, and without the key."""
        words = told.decode("utf-8", "replace") if isinstance(told, bytes) else told
        words = words[: 64 * QUOTED]
        return text.clean(words.replace(self._key, "***") if self._key else words).strip()[:QUOTED]

    def _path(self, path: str) -> str:
        return urlsplit(self.base).path + path


def _split(url: str) -> tuple[SplitResult, int | None]:
    shown = text.clean(url.rpartition("@")[2].partition("?")[0])[:QUOTED]  # what stands before @ is nobody's business
    wrong = UsageError(f"{shown!r} is no http or https address", fix="write http://HOST:PORT/v1")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise wrong from None
    sent = f"{parts.hostname or ''}{parts.path}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise wrong
    if not (sent.isascii() and sent.isprintable()) or " " in sent:
        raise UsageError(f"{shown!r} has characters that no address can carry", fix="write them as %XX")
    return parts, port


class Answer:
    """The answer to one request. Every wait for it ends at a deadline that `expect` sets."""

    def __init__(self, server: Server, line: _Line, what: str) -> None:
        self._server = server
        self._line = line
        self._what = what
        self._missing = ""
        self._response: httpcore2.Response | None = None

    def expect(self, missing: str) -> None:
        """Set the deadline anew; `missing` is what the error says when it passes, e.g. "no answer began"."""
        self._missing = missing
        self._line.until = time.monotonic() + self._server.timeout_s

    def open(self, response: httpcore2.Response) -> None:
        """Take the status and the headers.

        Raises:
            UnavailableError: They promise something else than JSON or events of JSON.
        """
        self._response = response
        self.expect("the answer didn't end")
        headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if 300 <= response.status < 400:
            raise self._redirected(headers.get(b"location", ""))
        if response.status != 200:
            raise self._refusal(response.status)
        packed = headers.get(b"content-encoding", "identity")
        if packed.strip().lower() not in ("", "identity"):
            raise self.failed(f"packed its answer, which it wasn't asked to: {self._server.quote(packed)}")
        if int(headers.get(b"content-length", "0")) > MOST_BYTES:
            raise self.failed(f"announced {headers[b'content-length']} bytes; {MOST_BYTES} are read at most")
        if headers.get(b"content-type", "").lower().startswith("text/html"):
            raise self.failed(f"answered a web page: {self._server.quote(self._beginning()) or 'an empty one'}")

    def json(self) -> Any:
        """Return the whole answer."""
        return self._parsed(b"".join(self._chunks()))

    def events(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the events of a stream up to [DONE], each with the `perf_counter_ns` at which its line was whole."""
        for line in self._lines():
            at = time.perf_counter_ns()
            name, _, data = line.strip().partition(b":")
            if name != b"data":
                continue
            if data.strip() == b"[DONE]":
                self._end()
                return
            event = self._parsed(data)
            if not isinstance(event, dict):
                raise self.malformed("an event", event)
            if event.get("error"):
                raise self.failed(f"failed in the middle of its answer: {self._server.quote(str(event['error']))}")
            yield at, event
        raise self.failed("dropped the connection in the middle of its answer")

    def malformed(self, what: str, value: object) -> UnavailableError:
        """Return the error that says that a part of the answer isn't what the API has there."""
        told = self._server.quote(repr(value)[: 64 * QUOTED])
        return self.failed(f"answered {what} that the completions API doesn't have: {told}")

    def failed(self, what: str) -> UnavailableError:
        """Return the error that says what the server did."""
        return UnavailableError(f"{self._server.url}: {self._what}: the server {what}", fix="look at the server's log")

    def late(self) -> StageTimeoutError:
        """Return the error of a deadline that has passed."""
        message = f"{self._server.url}: {self._what}: {self._missing} within {self._server.timeout_s:g} s"
        return StageTimeoutError(message, fix="raise --timeout, or look at what the server does")

    def _chunks(self) -> Iterator[bytes]:
        count = 0
        assert self._response is not None  # noqa: S101 - `open` comes first
        assert isinstance(self._response.stream, Iterable)  # noqa: S101 - the synchronous pool's always is
        for chunk in self._response.stream:
            count += len(chunk)
            if count > MOST_BYTES:
                raise self.failed(f"went on after {MOST_BYTES} bytes of answer")
            yield chunk

    def _lines(self) -> Iterator[bytes]:
        rest = b""
        for chunk in self._chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MOST_LINE_BYTES or any(len(line) > MOST_LINE_BYTES for line in lines):
                raise self.failed(f"sent a line of more than {MOST_LINE_BYTES} bytes: {self._server.quote(rest[:999])}")
            yield from lines
        if rest:
            yield rest

    def _end(self) -> None:
        """Read what ends the answer, so that its connection can be used again."""
        self._line.until = min(self._line.until, time.monotonic() + ENDING_S)
        with suppress(httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError, UnavailableError):
            for _ in self._chunks():
                pass

    def _beginning(self) -> bytes:
        """Return the first bytes of the answer, as far as they come."""
        found = b""
        with suppress(httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
            for chunk in self._chunks():
                found += chunk
                if len(found) >= 4 * QUOTED:
                    break
        return found

    def _parsed(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            told = self._server.quote(data) or "nothing"
            raise self.failed(f"answered something else than JSON: {told}") from None

    def _redirected(self, location: str) -> UnavailableError:
        try:
            parts = urlsplit(location)
            where = f"{parts.scheme}://{parts.hostname}" if parts.hostname else parts.path
        except ValueError:
            where = "no address"
        error = self.failed(f"sends its callers elsewhere: {self._server.quote(where) or 'nowhere'}")
        error.fix = "give the address where the completions API is; redirects aren't followed"
        return error

    def _refusal(self, status: int) -> UnavailableError:
        told = self._server.quote(self._beginning()) or "nothing"
        message = f"{self._server.url}: {self._what} answered {status}: {told}"
        if status in (400, 404, 422):
            return RefusedByServerError(message, fix="check the address and --model")
        if status in (401, 403):
            return UnavailableError(message, fix="name the variable that holds its API key: --key-from VARIABLE")
        return UnavailableError(message, fix="look at the server's log")


class _Line(httpcore2.NetworkBackend):
    """A place for one connection; each of its waits ends at `until`, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        self.until = 0.0
        self.pool = httpcore2.ConnectionPool(max_connections=1, keepalive_expiry=KEPT_S, network_backend=self)
        self._tcp = httpcore2.SyncBackend()

    def left(self) -> float:
        """Return the seconds that are left."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout
        return left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - the deadline stands for it
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect."""
        return _Stream(self._tcp.connect_tcp(host, port, self.left(), local_address, socket_options), self.left)


class _Stream(httpcore2.NetworkStream):
    """A connection that waits as long as its line has left."""

    def __init__(self, stream: httpcore2.NetworkStream, left: Callable[[], float]) -> None:
        self._stream = stream
        self._left = left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 - as in `connect_tcp`
        """Read what has come."""
        return self._stream.read(max_bytes, self._left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002 - as in `connect_tcp`
        """Write everything."""
        self._stream.write(buffer, self._left())

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002 - as in `connect_tcp`
    ) -> httpcore2.NetworkStream:
        """Go on encrypted."""
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, self._left()), self._left)

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection knows of itself."""
        return self._stream.get_extra_info(info)
