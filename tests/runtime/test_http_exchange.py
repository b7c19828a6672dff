"""A server that does anything but serve: each of its faults ends soon, in an error that says what came."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.errors import StageTimeoutError, UnavailableError, UsageError
from optikit.runtime import http_exchange
from optikit.runtime.completions_client import Client, RefusedByServerError
from optikit.runtime.http_exchange import Server

TIMEOUT = 0.6
SOON = 20 * TIMEOUT
"""Far less than a server that drips would hold us, far more than a busy machine takes."""
KEY = "canary-9f8e7d"
EVENT = b'data: {"choices":[{"text":"x"}]}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CLOSING = STREAM + b"Connection: close\r\n\r\n"


class Hostile:
    """Reads whole requests and answers each with what `act` sends: bytes, or a function of the socket."""

    def __init__(self, act):
        self.act = act
        self.connections = 0
        self.requests = []
        self.done = threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with connection:
            try:
                while head := read_request(connection):
                    self.requests.append(head)
                    if callable(self.act):
                        self.act(connection, self.done)
                    else:
                        connection.sendall(self.act)
                    if b"Connection: close" in (self.act if isinstance(self.act, bytes) else b"Connection: close"):
                        return
            except OSError:
                return


def read_request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l")), 0
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head


@contextmanager
def hostile(act):
    server = Hostile(act)
    try:
        yield server
    finally:
        server.done.set()
        server.socket.close()


def ok(body, *headers):
    lines = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def told(*events):
    return CLOSING + b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events) + b"data: [DONE]\n\n"


def text(**more):
    return {"choices": [{"text": "x"}], **more}


def dripping(first, drop, every=0.05):
    """Send `first`, then `drop` again and again: never silent for long, never at an end."""

    def act(connection, done):
        connection.sendall(first)
        while not done.wait(every):
            connection.sendall(drop)

    return act


def flooding(first, block):
    def act(connection, done):
        connection.sendall(first)
        while not done.is_set():
            connection.sendall(block)

    return act


def silent(_connection, done):
    done.wait(30)


def streamed(client):
    return client.stream("m", "hello", 3, extra={})


def listed(client):
    return client.models()


def echoed(client):
    return client.prompt_logprobs("m", "hello there")


def fails(act, ask, error, said):
    """Ask a hostile server; its fault is told soon, in one printable line, with the address and without the key."""
    with hostile(act) as server:
        begun = time.monotonic()
        with Client(server.url, timeout_s=TIMEOUT, key=KEY) as client, pytest.raises(error, match=said) as caught:
            ask(client)
    assert time.monotonic() - begun < SOON
    message = caught.value.message
    assert server.url in message
    assert caught.value.fix
    assert message.isprintable()
    assert len(message) < 2 * http_exchange.QUOTED
    assert KEY not in message


@pytest.mark.parametrize(
    ("act", "ask", "said"),
    [
        (silent, listed, "no answer began within 0.6 s"),
        (dripping(b"H", b"T"), listed, "no answer began|dropped the connection"),
        (dripping(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), listed, "no answer began"),
        (dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), listed, "no answer began"),
        (dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" "), listed, "the answer didn't end"),
        (dripping(CLOSING, b": ping\n\n"), streamed, "the answer didn't end"),
        (dripping(CLOSING + EVENT, b"data: {}\n\n"), streamed, "no next token came"),
        (dripping(STREAM + b"Transfer-Encoding: chunked\r\n\r\n", b"0"), streamed, "the answer didn't end|dropped"),
    ],
)
def test_a_server_that_drips_is_given_up_in_time(act, ask, said):
    fails(act, ask, StageTimeoutError if "dropped" not in said else (StageTimeoutError, UnavailableError), said)


@pytest.mark.parametrize(
    ("act", "ask", "said"),
    [
        (flooding(CLOSING + b"data: ", b"x" * 65536), streamed, "a line of more than 1048576 bytes"),
        (flooding(CLOSING, EVENT * 500), streamed, "went on after 7 pieces of 3 tokens"),
        (flooding(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 2000), listed, "dropped the connection"),
        (b"HTTP/1.1 200 " + b"A" * 200_000, listed, "dropped the connection"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n", listed, "dropped the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n", listed, "announced 1073741824 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nx", listed, "dropped the connection"),
        (STREAM + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\nx\r\n", streamed, "dropped the connection"),
        (STREAM + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc", listed, "the answer didn't end|dropped"),
        (
            STREAM + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\nf" + b"f" * 17 + b"\r\nx",
            listed,
            "dropped",
        ),
        (b"\x00\xff\x1b[31m garbage\r\n\r\n", listed, "dropped the connection"),
        (lambda _connection, _done: None, listed, "dropped the connection"),
        (ok(gzip.compress(b" " * 10_000_000), b"Content-Encoding: gzip"), listed, "packed its answer.*gzip"),
        (ok(b"<script>alert(1)</script>", b"Content-Type: text/html"), listed, "a web page: <script>"),
        (ok(b"[" * 100_000 + b"]" * 100_000), listed, "something else than JSON"),
        (ok(b""), listed, "something else than JSON: nothing"),
        (ok(b"\x1b[2Jred"), listed, "something else than JSON: red"),
        (b"HTTP/1.1 500 no\r\nConnection: close\r\n\r\n\x1b]0;t\x07\n::error::x", listed, "answered 500: ::error::x"),
        (b"HTTP/1.1 401 no\r\nConnection: close\r\n\r\nBearer " + KEY.encode(), listed, r"401: Bearer \*\*\*"),
        (
            b"HTTP/1.1 302 x\r\nLocation: http://me:pw@evil/?k=1\r\nConnection: close\r\n\r\n",
            listed,
            "elsewhere: .*evil",
        ),
        (b"HTTP/1.1 301 x\r\nLocation: /v1/models\r\nConnection: close\r\n\r\n", listed, "elsewhere: /v1/models"),
        (CLOSING + EVENT, streamed, "dropped the connection in the middle"),
        (CLOSING + b'data: {"error": "x\\n\\u001b[31my"}\n\n', streamed, "in the middle of its answer: x y"),
        (CLOSING + b"data: \xff\xfe\n\n", streamed, "something else than JSON"),
    ],
)
def test_a_fault_is_told_with_what_came(act, ask, said):
    either = (StageTimeoutError, UnavailableError) if "didn't end" in said else UnavailableError
    fails(act, ask, either, said)


@pytest.mark.parametrize("answer", [[], None, 5, {"data": None}, {"data": [{"id": 5}]}, {"data": ["m"]}, {"data": {}}])
def test_a_list_of_models_that_is_none(answer):
    fails(ok(json.dumps(answer).encode()), listed, UnavailableError, "lists no models")


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([{"choices": 5}], "answered choices that .*: 5"),
        ([{"choices": ["a"]}], "answered choices"),
        ([{"choices": {"a": 1}}], "answered choices"),
        ([{"choices": [{"text": 5}]}], "answered a text"),
        ([{"choices": [{"token_ids": ["1"]}]}], "answered token numbers"),
        ([{"choices": [{"token_ids": 7}]}], "answered token numbers"),
        ([[1]], "answered an event"),
        ([text(usage="x")], "answered a usage"),
        ([text(), text(usage={"completion_tokens": "3"})], "a number of completion_tokens"),
        ([text(), text(usage={"completion_tokens": 10**12})], "a number of completion_tokens"),
        ([text(), text(usage={"completion_tokens": 4})], "answered 3 tokens"),
        ([text(), text(usage={"prompt_tokens": -5})], "a number of prompt_tokens"),
        ([{"choices": None}], "streamed 0 pieces"),
        ([text()], "streamed 1 pieces"),
        ([], "streamed 0 pieces"),
    ],
)
def test_a_stream_of_another_shape(events, said):
    fails(told(*events), streamed, UnavailableError, said)


def echo(logprobs, tokens=("he", "llo there")):
    inner = {"token_logprobs": logprobs, "tokens": list(tokens)}
    return ok(json.dumps({"choices": [{"text": "", "logprobs": inner}]}).encode())


@pytest.mark.parametrize("value", [5.0, 1e-9, float("nan"), float("inf"), float("-inf"), "x", True, -(10**400), None])
def test_no_log_probability(value):
    fails(echo([None, value]), echoed, UnavailableError, "answered a log-probability that")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (ok(b'{"choices": []}'), "answered an answer"),
        (ok(b"[]"), "answered an answer"),
        (ok(b'{"choices": [{"logprobs": 3}]}'), "answered log-probabilities"),
        (echo({"a": 1}), "answered log-probabilities"),
        (echo([None, -1.0], ["a", 5]), "answered tokens"),
        (echo([None, -1.0], ["a", "b", "c"]), "2 log-probabilities of 3 tokens"),
        (echo([None, -1.0], ["hello there", ""]), "a first token that is the whole prompt"),
    ],
)
def test_an_echo_of_another_shape(act, said):
    fails(act, echoed, UnavailableError, said)


def test_an_echo_is_read_and_its_absence_is_no_fault():
    with hostile(echo([None, -1.5])) as server, Client(server.url, timeout_s=5) as client:
        found = echoed(client)
    assert (found.logprobs, found.scored_bytes) == ((-1.5,), len("hello there") - len("he"))
    with hostile(echo([None, -1.5], ["<s>", "hello there"])) as server, Client(server.url, timeout_s=5) as client:
        assert echoed(client).scored_bytes == len("hello there")
    for absent in (ok(b'{"choices": [{"text": ""}]}'), echo([]), b"HTTP/1.1 400 no\r\nConnection: close\r\n\r\n"):
        with hostile(absent) as server, Client(server.url, timeout_s=5) as client:
            assert echoed(client) is None


def test_a_refusal_has_its_own_error():
    fails(b"HTTP/1.1 422 no\r\nConnection: close\r\n\r\nno such field", streamed, RefusedByServerError, "no such field")


def chunked(*parts):
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return STREAM + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def test_a_connection_is_used_again():
    with hostile(chunked(EVENT, EVENT, b"data: [DONE]\n\n")) as server, Client(server.url, timeout_s=5) as client:
        for _ in range(3):
            assert streamed(client).tokens == 2
    assert server.connections == 1
    assert len(server.requests) == 3


def test_a_stream_that_goes_on_after_its_end_holds_nobody():
    begun = time.monotonic()
    with (
        hostile(dripping(CLOSING + EVENT + EVENT + b"data: [DONE]\n\n", b": ping\n\n")) as server,
        Client(server.url, timeout_s=30) as client,
    ):
        assert streamed(client).tokens == streamed(client).tokens == 2
    assert time.monotonic() - begun < 15
    assert server.connections == 2


def test_the_time_of_a_piece_is_that_of_its_line():
    def act(connection, done):
        connection.sendall(CLOSING + EVENT)
        done.wait(0.3)
        connection.sendall(EVENT[:10])
        done.wait(0.3)
        connection.sendall(EVENT[10:] + b"data: [DONE]\n\n")

    with hostile(act) as server, Client(server.url, timeout_s=10) as client:
        found = streamed(client)
    first, second = found.piece_ns
    assert second - first > 0.5e9  # it is whole only then
    assert found.start_ns < first


def test_a_request_says_who_asks_and_for_plain_bytes():
    models = ok(b'{"data": [{"id": "m"}]}')
    with hostile(models) as server, Client(f"{server.url}/v1/", timeout_s=5, key=KEY) as client:
        assert client.models() == ("m",)
    head = server.requests[0].decode()
    assert head.startswith("GET /v1/models HTTP/1.1\r\n")
    assert f"Authorization: Bearer {KEY}" in head
    assert "Accept-Encoding: identity" in head


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "ftp://host/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:abc/",
        "http://[::1",
        "http://me:s3cret@exa mple:1/",
        "http://me:s3cret@host/\u00fc?token=s3cret",
        "http://me:s3cret@host:x/?token=s3cret",
        "http://host/\x1b[31m",
    ],
)
def test_an_address_that_is_none_is_told_without_its_credentials(url):
    with pytest.raises(UsageError, match=r"no http or https address|no address can carry") as caught:
        Server(url, timeout_s=1)
    assert "s3cret" not in caught.value.message
    assert caught.value.message.isprintable()


def test_an_address_is_printed_without_credentials_and_read_as_one_writes_it():
    server = Server("https://me:pw@host:81/api/?k=1", timeout_s=1)
    assert (server.url, server.base) == ("https://host:81/api/", "https://host:81/api/v1")
    assert Server("http://[::1]:8/v1", timeout_s=1).base == "http://[::1]:8/v1"
    with pytest.raises(UsageError, match="no HTTP header can carry"):
        Server("http://host", timeout_s=1, key="a\nb")


@pytest.mark.parametrize("url", ["http://" + "a" * 300 + "/", "http://127.0.0.1:9/"])
def test_nobody_there(url):
    with pytest.raises(UnavailableError, match="can't be reached") as caught:
        Client(url, timeout_s=5).models()
    assert caught.value.fix


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["choices", "text", "usage", "token_ids", "logprobs", "tokens", "token_logprobs", "data", "id"]
                ),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_no_json_ends_as_a_bug(answer):
    for act in (ok(json.dumps(answer).encode()), told(answer)):
        with hostile(act) as server, Client(server.url, timeout_s=5) as client:
            for ask in (listed, streamed, echoed, lambda client: client.token_logprobs("m", [1, 2])):
                with suppress(UnavailableError):
                    ask(client)
