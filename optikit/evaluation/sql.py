"""Is a written SQL query right? Run it and the reference on the same SQLite database and compare what comes back.

The query comes from a language model and is hostile until proven otherwise: it runs in a database in memory, may only
read, can't attach files, load extensions or change settings, and is stopped after a number of steps.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass

STEPS = 5_000_000
"""Virtual-machine instructions after which a query counts as running away: about a second."""
ROWS = 100_000
MOST_BYTES = 1_000_000
"""Longest text or blob that a query may make."""
_READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Whether the query's result is the reference's; `reason` says why not."""

    correct: bool
    reason: str = ""


def same_result(schema: str, reference: str, query: str) -> Outcome:
    """Compare two queries on the database that `schema` (SQL with CREATE and INSERT) makes.

    Rows are compared as a multiset; in order where the reference has ORDER BY. Column names don't matter.

    Raises:
        ValueError: The schema or the reference itself fails: the item is broken, not the answer.
    """
    try:
        expected = _rows(schema, reference)
    except sqlite3.Error as error:
        msg = f"the reference query fails: {error}"
        raise ValueError(msg) from error
    try:
        found = _rows(schema, query)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        return Outcome(correct=False, reason=f"{type(error).__name__}: {error}")
    if "order by" in " ".join(reference.lower().split()):
        same = found == expected
    else:
        same = Counter(found) == Counter(expected)
    return Outcome(correct=same, reason="" if same else f"{len(found)} rows, not the {len(expected)} expected")


def _rows(schema: str, query: str) -> list[tuple[object, ...]]:
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(schema)
        database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
        database.set_progress_handler(lambda: 1, STEPS)
        return database.execute(query).fetchmany(ROWS)
    finally:
        database.close()
