"""Answers in SQL: right is what returns the same rows; whatever else a query tries is stopped."""

from __future__ import annotations

import time

import pytest

from optikit.evaluation.sql import same_result

SCHEMA = """
CREATE TABLE town (name TEXT, people INTEGER);
INSERT INTO town VALUES ('Ulm', 128), ('Jena', 110), ('Ulm', 128), ('Bern', 134);
"""


@pytest.mark.parametrize(
    ("reference", "query", "correct"),
    [
        ("SELECT name FROM town", "select NAME from town order by people", True),
        ("SELECT name FROM town", "SELECT DISTINCT name FROM town", False),
        ("SELECT name FROM town ORDER BY people", "SELECT name FROM town ORDER BY people DESC", False),
        ("SELECT name FROM town ORDER BY people", "SELECT name AS n FROM town ORDER BY people ASC", True),
        ("SELECT count(*) FROM town", "SELECT 4", True),
        ("SELECT max(people) FROM town", "SELECT people FROM town WHERE name = 'Bern'", True),
    ],
)
def test_rows_decide(reference, query, correct):
    assert same_result(SCHEMA, reference, query).correct is correct


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE town",
        "DELETE FROM town",
        "INSERT INTO town VALUES ('x', 1)",
        "ATTACH DATABASE '/tmp/evil.db' AS evil",
        "PRAGMA writable_schema = 1",
        "SELECT 1; DROP TABLE town",
        "SELECT load_extension('/tmp/evil.so')",
        "SELECT length(zeroblob(900000000))",
        "not sql at all",
        "SELECT nothing FROM nowhere",
        "",
    ],
)
def test_anything_but_reading_is_wrong_with_a_reason(query):
    outcome = same_result(SCHEMA, "SELECT name FROM town", query)
    assert not outcome.correct
    assert outcome.reason


def test_a_query_that_never_ends_is_stopped():
    started = time.monotonic()
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    outcome = same_result(SCHEMA, "SELECT 1", endless)
    assert "interrupted" in outcome.reason
    assert time.monotonic() - started < 30


def test_a_broken_reference_is_the_items_fault():
    with pytest.raises(ValueError, match="the reference query fails: no such table: village"):
        same_result(SCHEMA, "SELECT * FROM village", "SELECT 1")
