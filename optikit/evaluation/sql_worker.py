"""The child's side of SQL: builds a database in memory, runs two queries on it, compares what they return.

Schema and queries are hostile until proven otherwise: the first comes with a data set, the last from a language model.
An authorizer looks at every statement from the first on, nothing on disk can be opened or written, and instructions,
processor time, memory, rows and bytes have bounds. A line of JSON with `schema`, `reference` and `query` is answered
by two lines: what is wrong with the item's own SQL, if anything, then what is wrong with the query.

Standard library only: it starts quickly, and little is in the process that a statement could break.
"""

from __future__ import annotations

import json
import resource
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

STEPS = 5_000_000
"""Virtual-machine instructions after which a statement counts as running away: about a second."""
STEPS_BETWEEN = 10_000
"""Instructions between two looks at how many there were."""
SECONDS = 10.0
"""Processor time of all that builds the database, and of each query: some single instructions take for ever."""
HEAP_BYTES = 256 * 2**20
"""Memory of SQLite: the database, what it sorts, what it returns."""
ADDRESS_SPACE_BYTES = 2**30
"""Memory of the whole process."""
ROWS = 100_000
RESULT_BYTES = 32 * 2**20
"""Most that a query may return, counting texts and blobs and eight bytes for every value."""
MOST_BYTES = 1_000_000
"""Longest text or blob that a statement may make."""
QUERY_BYTES = 100_000
"""Longest query."""
READY, OUT_OF_MEMORY = "ready", "it needs too much memory"

_READS = {"SELECT", "READ", "FUNCTION", "RECURSIVE"}
_BUILDS = _READS | {
    *("INSERT", "UPDATE", "DELETE", "CREATE_TABLE", "CREATE_INDEX", "CREATE_VIEW", "CREATE_TRIGGER", "ALTER_TABLE"),
    *("CREATE_TEMP_TABLE", "CREATE_TEMP_INDEX", "CREATE_TEMP_VIEW", "CREATE_TEMP_TRIGGER", "DROP_TEMP_TABLE"),
    *("DROP_TEMP_INDEX", "DROP_TEMP_VIEW", "DROP_TEMP_TRIGGER", "DROP_TABLE", "DROP_INDEX", "DROP_VIEW"),
    *("DROP_TRIGGER", "ANALYZE", "REINDEX", "TRANSACTION", "SAVEPOINT"),
}
_NOT_HERE = ("ATTACH", "DETACH", "PRAGMA", "CREATE_VTABLE", "DROP_VTABLE")
_NAMES = {getattr(sqlite3, f"SQLITE_{name}"): name for name in (*_BUILDS, *_NOT_HERE)}
"""What the authorizer is asked for: SQLite's number → its name."""
_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer"})
"""Functions that reach beyond the database."""
_PRAGMAS = frozenset({"foreign_keys", "defer_foreign_keys", "encoding", "user_version", "application_id"})
"""Settings that dumps of databases contain, and that stay inside the database."""


class _Database:
    """A database in memory, of which every statement is looked at."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._allowed = _BUILDS
        self._denied = ""
        self._steps = 0
        connection.execute(f"PRAGMA hard_heap_limit = {HEAP_BYTES}")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.set_authorizer(self._authorize)
        connection.set_progress_handler(self._runs_away, STEPS_BETWEEN)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")

    def build(self, schema: str) -> str:
        """Run the statements that make the database; return what is wrong with them."""
        why = self._trial(lambda: self._connection.executescript(schema))
        self._allowed = _READS
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, QUERY_BYTES)
        return why

    def rows(self, query: str) -> tuple[list[tuple[object, ...]], str]:
        """Return the rows of a query, and what is wrong with it."""
        found: list[tuple[object, ...]] = []
        why = self._trial(lambda: found.extend(_bounded(self._connection.execute(query))))
        return found, why

    def _trial(self, work: Callable[[], object]) -> str:
        self._denied, self._steps = "", 0
        try:
            with _processor_time():
                work()
        except MemoryError:
            return OUT_OF_MEMORY
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            return self._denied or self._told(error)
        return ""

    def _told(self, error: Exception) -> str:
        return f"it ran more than {STEPS} instructions" if self._steps > STEPS else str(error)[:500]

    def _runs_away(self) -> bool:
        self._steps += STEPS_BETWEEN
        return self._steps > STEPS

    def _authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        name = _NAMES.get(action, str(action))
        if name == "PRAGMA" and self._allowed is _BUILDS and str(first).lower() in _PRAGMAS:
            return sqlite3.SQLITE_OK
        if name == "FUNCTION" and str(second).lower() in _FUNCTIONS:
            name = str(second).lower()
        if name in self._allowed:
            return sqlite3.SQLITE_OK
        self._denied = self._denied or f"{name.replace('_', ' ') if name.isupper() else name} is not allowed"
        return sqlite3.SQLITE_DENY


def _bounded(rows: Iterator[tuple[object, ...]]) -> Iterator[tuple[object, ...]]:
    """Yield rows.

    Raises:
        ValueError: There are too many, or they are too large.
    """
    size = 0
    for number, row in enumerate(rows):
        size += sum(8 + (len(value) if isinstance(value, str | bytes) else 0) for value in row)
        if number >= ROWS:
            raise ValueError(f"it returns more than {ROWS} rows")
        if size > RESULT_BYTES:
            raise ValueError(f"it returns more than {RESULT_BYTES >> 20} MiB")
        yield row


@contextmanager
def _processor_time() -> Iterator[None]:
    """Let the kernel end this process when it takes too long: nothing else interrupts one long instruction."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def answers(schema: str, reference: str, query: str) -> Iterator[str]:
    """Yield what is wrong with the item's own SQL, then what is wrong with the query; "" is nothing."""
    with closing(sqlite3.connect(":memory:")) as connection:
        database = _Database(connection)
        why = database.build(schema)
        if why:
            yield f"the schema fails: {why}"
            return
        expected, why = database.rows(reference)
        yield f"the reference query fails: {why}" if why else ""
        if not why:
            found, why = database.rows(query)
            yield why or _difference(reference, expected, found)


def _difference(reference: str, expected: list[tuple[object, ...]], found: list[tuple[object, ...]]) -> str:
    ordered = "order by" in " ".join(reference.lower().split())
    if found == expected or (not ordered and Counter(found) == Counter(expected)):
        return ""
    if len(found) != len(expected):
        return f"{len(found)} rows, not the {len(expected)} expected"
    return "its rows differ from those expected"


def _limit_process() -> None:
    for kind, most in (
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, ADDRESS_SPACE_BYTES),
    ):
        _, hard = resource.getrlimit(kind)
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, bound))


def main() -> None:
    """Answer the requests on standard input until it ends."""
    _limit_process()
    _say(READY)
    for line in sys.stdin.buffer:
        request: dict[str, Any] = json.loads(line)
        for answer in answers(request["schema"], request["reference"], request["query"]):
            _say(answer)


def _say(answer: str) -> None:
    sys.stdout.write(f"{json.dumps(answer)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
