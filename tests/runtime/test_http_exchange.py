"""A server that drips, floods, lies or goes away: each fault ends soon, in an error that says what came."""

from __future__ import annotations

import gzip
import time

import pytest

from optikit.errors import StageTimeoutError, UnavailableError, UsageError
from optikit.runtime.completions_client import Client, RefusedByServerError
from optikit.runtime.http_exchange import Server
from tests.hostile_server import (
    CLOSING,
    EVENT,
    KEY,
    STREAM,
    dripping,
    fails,
    flooding,
    hostile,
    listed,
    ok,
    silent,
    streamed,
)


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
    fails(act, ask, StageTimeoutError if "dropped" not in said else (StageTimeoutError, UnavailableError), said, 0.6)


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
        (STREAM + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nabc", listed, "dropped the connection"),
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
    fails(act, ask, UnavailableError, said)


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
