"""Keeps a server no longer than whoever started it: `python _keeper.py COMMAND…`, as `running` starts it.

Its standard input is a pipe from its starter. When that closes, because the starter is done or was killed, the server
gets ten seconds to end, and then everything that it started goes with it: no group of processes outlives its purpose.
When the server ends first, so does this, with its exit code. Standard library only: it runs in any interpreter.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

GRACE_SECONDS = 10.0


@contextmanager
def running(
    command: Sequence[str], *, variables: Mapping[str, str], log: Path, directory: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; yields its keeper, whose process id is that of their group.

    Args:
        command: The server's.
        variables: Its environment.
        log: File for all that it prints.
        directory: Where it runs; None is here.
    """
    with log.open("wb") as said:
        keeper = subprocess.Popen(
            [sys.executable, __file__, *command],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=dict(variables),
            start_new_session=True,
        )
    try:
        yield keeper
    finally:
        if keeper.stdin is not None:
            keeper.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            keeper.wait(2 * GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)  # also what outlived a server that crashed
        keeper.wait()


def main(command: list[str]) -> int:
    """Run a command until it ends or standard input closes; return its exit code, of a signal 128 and its number."""
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    left_alone = threading.Event()
    threading.Thread(target=_end_with_starter, args=(server, left_alone), daemon=True).start()
    code = server.wait()
    if left_alone.is_set():
        os.killpg(0, signal.SIGKILL)  # what the server started, and this process
    return code if code >= 0 else 128 - code


def _end_with_starter(server: subprocess.Popen[bytes], left_alone: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    left_alone.set()
    server.terminate()
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
