"""`optikit serve` in a process of its own, and what its answers are held to."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import openai

KEY = "secret-of-the-test"


class Running:
    """A server on a free port of this machine.

    Args:
        directory: What it serves.
        arguments: Options of `optikit serve`.
        variables: Environment variables.
    """

    def __init__(self, directory: Path, *arguments: str, **variables: str) -> None:
        command = [sys.executable, "-m", "optikit", "serve", str(directory), "--port", "0", *arguments]
        environment = os.environ | {"NO_COLOR": "1"} | variables
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.url + self.process.stderr.read()
        self.port = int(self.url.split(":")[2].split("/")[0])

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0, timeout=60)

    def raw(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Return the status and the body of a request that no client would send."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, body, {"Authorization": f"Bearer {KEY}", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=40)
        return self.process.returncode, said
