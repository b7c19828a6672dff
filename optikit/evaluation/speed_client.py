"""The conductor's side of an arm: start it, ask it, stop it while others are timed, end it.

A waiting arm is stopped by SIGSTOP: the thread pools of torch and onnxruntime spin for a while after their work, which
would slow whoever is timed next.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from optikit.evaluation import speed_worker
from optikit.process import child, failure, program


class Arm:
    """A child process that answers JSON lines; use it as a context manager.

    Args:
        name: For messages.
        log: File for the child's stderr.
        hang_s: Seconds without an answer after which it counts as hung.
        command: What to start; None is `speed_worker`.
    """

    def __init__(self, name: str, *, log: Path, hang_s: float, command: list[str] | None = None) -> None:
        self.name = name
        self._log = log
        self._hang_s = hang_s
        self._waiting = b""
        log.unlink(missing_ok=True)
        self._stack = ExitStack()
        command = command or program.module(speed_worker.__name__)
        self._child = self._stack.enter_context(child.started(command, log=log, piped=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._child.pid

    def ask(self, verb: str, **request: Any) -> dict[str, Any]:
        """Wake the arm, send one request, return its answer, and stop the arm again.

        Raises:
            OptikitError: The arm's own error; or it died, or didn't answer in time.
        """
        self._child.signal(signal.SIGCONT)
        try:
            self._child.input.write(json.dumps({verb: request}).encode() + b"\n")
            self._child.input.flush()
        except BrokenPipeError:
            raise self._child.death(self.name) from None
        answer: dict[str, Any] = json.loads(self._line(verb))
        if not answer.pop("ok"):
            failure.raise_failure(answer, step=self.name, log=self._log)
        self._child.signal(signal.SIGSTOP)
        return answer

    def _line(self, verb: str) -> bytes:
        deadline = time.monotonic() + self._hang_s
        descriptor = self._child.output.fileno()
        while b"\n" not in self._waiting:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                fix = f"raise hang_s, or look at what it does: {self._log}"
                raise failure.no_answer(f"{self.name}, asked to {verb}", self._hang_s, self._log, fix=fix)
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise self._child.death(self.name)
            self._waiting += data
        line, _, self._waiting = self._waiting.partition(b"\n")
        return line
