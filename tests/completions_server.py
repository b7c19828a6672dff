"""A small OpenAI-compatible server over a real model through our runtime; it can also misbehave, one way at a time."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np


class Model:
    """A decoder with its tokenizer; one request at a time, as batch 1 has it."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        from optikit import runtime

        self.decoder = runtime.load(directory, threads=1)
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.lock = threading.Lock()

    def encode(self, prompt: str | list[int]) -> list[int]:
        return prompt if isinstance(prompt, list) else self.tokenizer.encode(prompt, add_special_tokens=False).ids

    def write(self, prompt: str | list[int], count: int) -> Iterator[tuple[int, int, str]]:
        tokens = self.encode(prompt)
        with self.lock:
            for token in self.decoder.greedy(np.array(tokens, np.int64), count):
                yield len(tokens), token, self.tokenizer.decode([token]) or "?"

    def echo(self, prompt: str | list[int], *, numbered: bool = False) -> dict[str, Any]:
        """Tell log-probabilities as the standard has it; `numbered` as vLLM does, with the likeliest tokens."""
        from optikit.evaluation.perplexity import token_nll

        tokens = np.array(self.encode(prompt), np.int64)
        with self.lock:
            logits = self.decoder.forward(tokens, 0)
        nll, best = token_nll(logits[:-1], tokens[1:]), logits[:-1].argmax(axis=1)
        told: dict[str, Any] = {"token_logprobs": [None, *(-nll).tolist()]}
        if not numbered:
            return told | {"tokens": [self.tokenizer.decode([int(token)]) for token in tokens]}
        likeliest = token_nll(logits[:-1], best)
        tops = [
            {f"token_id:{token}": -own, f"token_id:{first}": -most}
            for token, own, first, most in zip(tokens[1:], nll, best, likeliest, strict=True)
        ]
        return told | {"tokens": [f"token_id:{token}" for token in tokens], "top_logprobs": [None, *tops]}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model: Model, *, fault: str = "", strict: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.fault = fault
        self.strict = strict
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        pass

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        self.answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.fault
        if fault == "hang":
            time.sleep(5)
        elif fault == "500":
            self.answer(500, {"error": "out of \x1b[31mcores"})
        elif fault == "nonsense":
            self.reply(200, b"<html>hello</html>")
        elif fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.server.strict and ("ignore_eos" in body or "echo" in body):
            self.answer(400, {"error": "unknown parameter"})
        elif body.get("echo"):
            numbered = body.get("return_tokens_as_token_ids", False)
            echo = self.server.model.echo(body["prompt"], numbered=numbered)
            self.answer(200, {"choices": [{"text": "", "logprobs": echo}]})
        else:
            self.stream(body)

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        prompted = count = 0
        for before, token, text in self.server.model.write(body["prompt"], body["max_tokens"]):
            prompted, count = before, count + 1
            if count == 3 and self.server.fault == "cut":
                return
            told = {"token_ids": [token]} if body.get("return_token_ids") else {}
            self.event({"choices": [{"text": text, **told}]})
        if "stream_options" in body:
            self.event({"choices": [], "usage": {"prompt_tokens": prompted, "completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()

    def answer(self, status: int, body: dict[str, Any]) -> None:
        self.reply(status, json.dumps(body).encode())

    def reply(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(model: Model, **how: Any) -> Iterator[Server]:
    """Serve until the block ends."""
    server = Server(model, **how)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
