"""Is a written SQL query right? Run it and the reference on the same SQLite database and compare what comes back.

Query and schema are hostile until proven otherwise: both run in a process of their own, under limits; see `sql_worker`.
"""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from optikit.errors import OutOfMemoryError, StageFailedError
from optikit.evaluation import sql_worker
from optikit.process import child, program


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Whether the query's result is the reference's; `reason` says why not."""

    correct: bool
    reason: str = ""


class Sandbox:
    """One process for many queries; it starts with the first, and anew after a statement that ended it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._child: child.Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def same_result(self, schema: str, reference: str, query: str) -> Outcome:
        """Compare two queries on the database that `schema` (SQL with CREATE and INSERT) makes.

        Rows are compared as a multiset; in order where the reference has ORDER BY. Column names don't matter.

        Raises:
            ValueError: The schema or the reference itself fails: the item is broken, not the answer.
            OptikitError: The process could not be started, or ended for a reason of its own.
        """
        running = self._child or self._start()
        request = {"schema": schema, "reference": reference, "query": query}
        running.input.write(json.dumps(request).encode() + b"\n")
        running.input.flush()
        own = self._answer(running)
        if own is None:
            raise ValueError(f"the schema or the reference query fails: {self._death(running)}")
        if own:
            raise ValueError(own)
        reason = self._answer(running)
        if reason is None:
            reason = self._death(running)
        return Outcome(correct=not reason, reason=reason)

    def _start(self) -> child.Child:
        started = self._stack.enter_context(child.started(program.module(sql_worker.__name__), piped=True, grace_s=0))
        self._child = started
        if self._answer(started) != sql_worker.READY:
            raise StageFailedError(f"the process that runs SQL didn't start: {self._death(started)}")
        return started

    @staticmethod
    def _answer(running: child.Child) -> str | None:
        """Return the next answer; None if the process ended instead."""
        line = running.output.readline()
        return str(json.loads(line)) if line.endswith(b"\n") else None

    def _death(self, running: child.Child) -> str:
        """Return how a statement ended its process.

        Raises:
            OutOfMemoryError: The machine had no memory left: whose fault that is nobody knows.
            StageFailedError: It was no statement that ended it.
        """
        _, errors = running.finish()
        code = running.code or 0
        self._end()
        if code == -signal.SIGPROF:
            return f"it took more than {sql_worker.SECONDS:g} s of processor time"
        if code == -signal.SIGKILL:
            raise OutOfMemoryError("the process that runs SQL was killed", fix="give it more memory")
        if "MemoryError" in errors:
            return sql_worker.OUT_OF_MEMORY
        if code < 0:
            return f"it crashes SQLite: {signal.Signals(-code).name}"
        last = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
        raise StageFailedError(f"the process that runs SQL ended: {last}", fix="report this, with the item's SQL")

    def _end(self) -> None:
        self._child = None
        self._stack.close()
