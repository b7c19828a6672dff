"""`optikit serve` started on this machine, waited for, and ended: for load tests."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from optikit.errors import OptikitError
from optikit.process import env_variables, server
from optikit.runtime.completions_client import Client

HOST = "127.0.0.1"
ASK_SECONDS = 5
"""How long a server that is being started may take for one answer until it is asked again."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What to serve, and how.

    Attributes:
        directory: An output, a compiled directory or a model.
        batch: Answers written at once.
        queue: Requests that may wait.
        speculator: Directory of its speculation; None is the one that a run left beside the model.
        threads: CPU threads; None is all.
        key: What clients have to send.
    """

    directory: Path
    batch: int
    queue: int
    speculator: Path | None = None
    threads: int | None = None
    key: str = field(default="", repr=False)

    def command(self, port: int) -> list[str]:
        """Return the command line."""
        from optikit.serving.service import Limits

        found = [sys.executable, "-m", "optikit", "serve", str(self.directory.resolve()), "--port", str(port)]
        found += ["--batch", str(self.batch), "--queue", str(self.queue), "--max-body", str(Limits().most_bytes)]
        found += ["--speculator", str(self.speculator)] if self.speculator else []
        return found + (["--threads", str(self.threads)] if self.threads else [])


@contextmanager
def serving(how: Serving, *, log: Path, start_s: float) -> Iterator[tuple[str, int]]:
    """Serve a directory until the block ends; yields the server's address, and the process group that it runs in.

    Args:
        how: What to serve.
        log: File for everything that the server prints.
        start_s: Seconds that it may take until it answers.

    Raises:
        OptikitError: It ended instead of answering.
        StageTimeoutError: It didn't answer in time.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    url = f"http://{HOST}:{port}"
    environ = env_variables.kept() | env_variables.OFFLINE | ({"OPTIKIT_API_KEY": how.key} if how.key else {})
    with server.running(
        f"optikit serve {how.directory}",
        how.command(port),
        environ=environ,
        log=log,
        answers=lambda: _answers(url, how.key),
        start_s=start_s,
    ) as child:
        yield url, child.pid


def _answers(url: str, key: str) -> bool:
    with Client(url, timeout_s=ASK_SECONDS, key=key) as client:
        try:
            return bool(client.models())
        except OptikitError:
            return False
