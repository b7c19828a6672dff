"""A server that does anything but serve, one way at a time, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from optikit.runtime import http_exchange
from optikit.runtime.completions_client import Client

SOON = 25
"""Seconds: far less than a server that drips would hold us, far more than a busy machine takes."""
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


def fails(act, ask, error, said, timeout_s=10):
    """Ask a hostile server; its fault is told soon, in one printable line, with the address and without the key."""
    with hostile(act) as server:
        begun = time.monotonic()
        with Client(server.url, timeout_s=timeout_s, key=KEY) as client, pytest.raises(error, match=said) as caught:
            ask(client)
    assert time.monotonic() - begun < SOON
    message = caught.value.message
    assert server.url in message
    assert caught.value.fix
    assert message.isprintable()
    assert len(message) < 2 * http_exchange.QUOTED
    assert KEY not in message
