"""Answers in SQL: right is what returns the same rows; all else that schemas or queries try has an end and a name."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optikit.errors import OutOfMemoryError, StageFailedError
from optikit.evaluation import sql, sql_worker
from optikit.evaluation.sql import Outcome, Sandbox

SCHEMA = """
CREATE TABLE town (name TEXT, people INTEGER);
INSERT INTO town VALUES ('Ulm', 128), ('Jena', 110), ('Ulm', 128), ('Bern', 134);
"""
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as one:
        yield one


def asked(sandbox: Sandbox, query: str, reference: str = "SELECT name FROM town") -> Outcome:
    return sandbox.same_result(SCHEMA, reference, query)


@pytest.mark.parametrize(
    ("reference", "query", "correct"),
    [
        ("SELECT name FROM town", "select NAME from town order by people", True),
        ("SELECT name FROM town", "SELECT DISTINCT name FROM town", False),
        ("SELECT name FROM town ORDER BY people", "SELECT name FROM town ORDER BY people DESC", False),
        ("SELECT name FROM town ORDER BY people", "SELECT name AS n FROM town ORDER BY people ASC", True),
        ("SELECT count(*) FROM town", "SELECT 4", True),
        ("SELECT count(*) FROM town", "SELECT 4.0", True),
        ("SELECT count(*) FROM town", "SELECT '4'", False),
        ("SELECT max(people) FROM town", "SELECT people FROM town WHERE name = 'Bern'", True),
        ("SELECT CAST(x'ff' AS TEXT)", "SELECT CAST(x'ff' AS TEXT)", True),
        ("SELECT CAST(x'ff' AS TEXT)", "SELECT x'ff'", False),
        ("SELECT NULL", "SELECT NULL", True),
    ],
)
def test_rows_decide(sandbox: Sandbox, reference: str, query: str, correct: bool) -> None:
    assert asked(sandbox, query, reference).correct is correct


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("DROP TABLE town", "DELETE is not allowed"),
        ("DELETE FROM town", "DELETE is not allowed"),
        ("INSERT INTO town VALUES ('x', 1)", "INSERT is not allowed"),
        ("CREATE TEMP TABLE t (a)", "is not allowed"),
        ("ATTACH DATABASE '{here}/evil.db' AS evil", "ATTACH is not allowed"),
        ("VACUUM INTO '{here}/evil.db'", "ATTACH is not allowed"),
        ("PRAGMA writable_schema = 1", "PRAGMA is not allowed"),
        ("PRAGMA foreign_keys = 1", "PRAGMA is not allowed"),
        ("SELECT * FROM pragma_database_list", "is not allowed"),
        ("SELECT 1; DROP TABLE town", "one statement at a time"),
        ("SELECT load_extension('{here}/evil.so')", "load_extension is not allowed"),
        ("SELECT length(zeroblob(900000000))", "too big"),
        ("SELECT replace(printf('%.*c', 900000, 'a'), 'a', printf('%.*c', 900000, 'b'))", "too big"),
        ("not sql at all", "syntax error"),
        ("SELECT name FROM nowhere", "no such table"),
        ("SELECT '\ud800'", "surrogates not allowed"),
        ("SELECT 1\0", "null"),
        ("SELECT 1" + " " * sql_worker.QUERY_BYTES, "too large"),
        (ENDLESS + "count(*) FROM n", "it ran more than 5000000 instructions"),
        (ENDLESS + "i FROM n", "it returns more than 100000 rows"),
        (ENDLESS + "zeroblob(1000000) FROM n", "it returns more than 32 MiB"),
        (ENDLESS.replace("FROM n)", "FROM n LIMIT 99)") + "group_concat(printf('%.*c', 90000, 'a')) FROM n", "too big"),
        (
            ENDLESS.replace("FROM n)", "FROM n LIMIT 9999)") + "zeroblob(90000) || i FROM n ORDER BY 1",
            "too much memory",
        ),
        ("", "0 rows, not the 4 expected"),
        ("SELECT people FROM town", "its rows differ"),
    ],
)
def test_anything_but_reading_is_wrong_with_a_reason(sandbox: Sandbox, tmp_path: Path, query: str, reason: str) -> None:
    outcome = asked(sandbox, query.replace("{here}", str(tmp_path)))
    assert not outcome.correct
    assert reason in outcome.reason
    assert list(tmp_path.iterdir()) == []


def test_one_long_instruction_is_ended_by_the_kernel_and_the_next_query_has_a_process(
    sandbox: Sandbox,
) -> None:
    found = "instr(printf('%.*c', 999999, 'a'), printf('%.*c', 500000, 'a') || 'b')"
    assert asked(sandbox, "SELECT " + " + ".join([found] * 9)).reason == "it took more than 10 s of processor time"
    assert asked(sandbox, "SELECT name FROM town").correct


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ("ATTACH DATABASE '{here}/made.db' AS x; CREATE TABLE x.t (a)", "ATTACH is not allowed"),
        ("ATTACH DATABASE '{here}/victim.db' AS x; UPDATE x.secret SET v = 'changed'", "ATTACH is not allowed"),
        ("CREATE TABLE t (a); VACUUM INTO '{here}/made.db'", "ATTACH is not allowed"),
        ("VACUUM", "ATTACH is not allowed"),
        ("SELECT load_extension('{here}/x.so')", "load_extension is not allowed"),
        ("PRAGMA temp_store_directory = '{here}'", "PRAGMA is not allowed"),
        ("PRAGMA hard_heap_limit = 0", "PRAGMA is not allowed"),
        ("PRAGMA writable_schema = 1", "PRAGMA is not allowed"),
        ("CREATE VIRTUAL TABLE v USING fts5(a)", "CREATE VTABLE is not allowed"),
        ("CREATE TABLE t AS " + ENDLESS + "count(*) AS a FROM n", "it ran more than 5000000 instructions"),
        (
            "CREATE TABLE t AS " + ENDLESS.replace("FROM n)", "FROM n LIMIT 99999)") + "zeroblob(900000) AS a FROM n",
            "it needs too much memory",
        ),
        ("CREATE TABLE t (", "incomplete input"),
    ],
)
def test_the_items_own_sql_stays_in_its_database(sandbox: Sandbox, tmp_path: Path, schema: str, what: str) -> None:
    victim = tmp_path / "victim.db"
    with sqlite3.connect(victim) as database:
        database.execute("CREATE TABLE secret AS SELECT 'kept' AS v")
    database.close()
    before = victim.read_bytes()
    with pytest.raises(ValueError, match=f"^the schema fails: .*{what}"):
        sandbox.same_result(schema.replace("{here}", str(tmp_path)), "SELECT 1", "SELECT 1")
    assert [path.name for path in tmp_path.iterdir()] == ["victim.db"]
    assert victim.read_bytes() == before


def test_what_dumps_of_databases_contain_is_allowed(sandbox: Sandbox) -> None:
    dump = """PRAGMA foreign_keys=OFF; BEGIN TRANSACTION;
    CREATE TABLE a (id INTEGER PRIMARY KEY AUTOINCREMENT, x TEXT); INSERT INTO a VALUES (1, 'é'), (2, NULL);
    CREATE TABLE b (a REFERENCES a (id)); CREATE UNIQUE INDEX i ON a (x); CREATE VIEW w AS SELECT x FROM a;
    CREATE TRIGGER g AFTER INSERT ON b BEGIN UPDATE a SET x = 'seen' WHERE id = new.a; END;
    INSERT INTO b VALUES (2); ALTER TABLE b ADD COLUMN c DEFAULT 7; ANALYZE; REINDEX; DROP INDEX i; COMMIT;"""
    query = "SELECT x, c FROM w LEFT JOIN b ON a = 2 ORDER BY x"
    assert sandbox.same_result(dump, query, "SELECT 'seen', 7 UNION ALL SELECT 'é', 7").correct


def test_a_broken_reference_is_the_items_fault(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="the reference query fails: no such table: village"):
        asked(sandbox, "SELECT 1", "SELECT * FROM village")
    with pytest.raises(ValueError, match="the reference query fails: it returns more than 100000 rows"):
        asked(sandbox, "SELECT 1", ENDLESS + "i FROM n")


def test_many_queries_share_a_process_that_ends_with_its_sandbox() -> None:
    with Sandbox() as one:
        asked(one, "SELECT 1")
        assert one._child is not None
        pid = one._child.pid
        for number in range(50):
            assert asked(one, f"SELECT {number}", f"SELECT {number}").correct
        assert one._child.pid == pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_kill_from_outside_is_not_an_answer() -> None:
    with Sandbox() as one:
        asked(one, "SELECT 1")
        assert one._child is not None
        os.kill(one._child.pid, signal.SIGSTOP)
        os.kill(one._child.pid, signal.SIGKILL)
        with pytest.raises(OutOfMemoryError):
            asked(one, "SELECT 1")
        assert asked(one, "SELECT 1", "SELECT 1").correct


def test_a_process_that_cannot_start_is_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql.program, "module", lambda _: ["/nowhere/python"])
    with Sandbox() as one, pytest.raises(StageFailedError, match="nowhere/python can't be started"):
        asked(one, "SELECT 1")


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_an_answer_or_a_broken_item(sandbox: Sandbox, schema: str, query: str) -> None:
    assert isinstance(asked(sandbox, query).correct, bool)
    with suppress(ValueError):  # and nothing else
        sandbox.same_result(schema, "SELECT 1", query)
