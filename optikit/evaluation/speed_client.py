"""The conductor's side of an arm: start it, ask it, stop it while others are timed, end it.

A waiting arm is stopped by SIGSTOP: the thread pools of torch and onnxruntime spin for a while after their work, which
would slow whoever is timed next.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from optikit.errors import BY_CODE, OptikitError, OutOfMemoryError, StageFailedError, StageTimeoutError
from optikit.evaluation import speed_worker

LOG_TAIL = 2000
"""Characters of an arm's log that an error message quotes."""


class Arm:
    """A child process that answers JSON lines; use it as a context manager.

    Args:
        name: For messages.
        log: File for the child's stderr.
        hang_s: Seconds without an answer after which it counts as hung.
        command: What to start; None is `_arm`.
    """

    def __init__(self, name: str, *, log: Path, hang_s: float, command: list[str] | None = None) -> None:
        self.name = name
        self._log = log
        self._hang_s = hang_s
        self._waiting = b""
        own = [sys.executable, "-m", speed_worker.__name__, str(os.getpid())]
        with log.open("wb") as errors:
            self._child = subprocess.Popen(command or own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()  # works on a stopped process, too
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(BrokenPipeError):  # what a dead arm never read
                cast("IO[bytes]", pipe).close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._child.pid

    def ask(self, verb: str, **request: Any) -> dict[str, Any]:
        """Wake the arm, send one request, return its answer, and stop the arm again.

        Raises:
            OptikitError: The arm's own error; or it died, or didn't answer in time.
        """
        self._signal(signal.SIGCONT)
        try:
            pipe = cast("IO[bytes]", self._child.stdin)
            pipe.write(json.dumps({verb: request}).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            raise self._death() from None
        answer: dict[str, Any] = json.loads(self._line(verb))
        if not answer.pop("ok"):
            error = BY_CODE.get(answer["code"], OptikitError)
            raise error(f"{self.name}: {answer['message']}", fix=answer["fix"])
        self._signal(signal.SIGSTOP)
        return answer

    def _line(self, verb: str) -> bytes:
        deadline = time.monotonic() + self._hang_s
        descriptor = cast("IO[bytes]", self._child.stdout).fileno()
        while b"\n" not in self._waiting:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                message = f"{self.name}: no answer to {verb!r} in {self._hang_s:g} s"
                raise StageTimeoutError(message, fix=f"raise hang_s, or look at what it does: {self._tail()}")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise self._death()
            self._waiting += data
        line, _, self._waiting = self._waiting.partition(b"\n")
        return line

    def _signal(self, number: signal.Signals) -> None:
        if self._child.poll() is None:
            self._child.send_signal(number)

    def _death(self) -> OptikitError:
        code = self._child.wait()
        if -code == signal.SIGKILL:
            message = f"{self.name}: its process was killed, most often for memory"
            return OutOfMemoryError(message, fix="measure fewer baselines at once: every arm holds its model in memory")
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return StageFailedError(f"{self.name}: its process ended with {what}", fix=f"its log ends: {self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip() or "(empty)"
