"""Collecting and checking: nothing that is in use goes, nothing damaged stays, and what remains is whole."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from optikit.cli.cache import app as cache
from optikit.cli.verify import verify
from optikit.errors import InputMissingError, IntegrityError, UsageError
from optikit.store import downloads, maintenance
from optikit.store.manifest import NAME
from optikit.store.store import Store, cache_key
from tests.store.artifacts import FILES, KEY, commit

KEYS = [cache_key(number=number) for number in range(4)]
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def full(store: Store) -> Store:
    """Four artifacts; the first was used longest ago."""
    for age, key in enumerate(KEYS):
        path = commit(store, key).path
        os.utime(path, (1000 + age, 1000 + age))
    return Store(store.root)


def _bytes(store: Store) -> int:
    return sum(entry.size_bytes for entry in maintenance.entries(store))


def test_without_a_bound_only_rubbish_goes(full: Store) -> None:
    (full.root / "corrupt" / "x").mkdir()
    (full.scratch(KEYS[0]) / "block").write_text("of something finished")
    (full.scratch(KEY) / "block").write_text("of something unfinished")
    done = maintenance.gc(full, set())
    assert {(one.kind, one.name) for one in done.removed} == {("corrupt", "x"), ("scratch", KEYS[0])}
    assert full.keys() == tuple(sorted(KEYS))
    assert (full.scratch(KEY) / "block").exists()


def test_given_up_work_goes(full: Store) -> None:
    old = time.time() - maintenance.ABANDONED_SECONDS - 10
    for path in (full.scratch(KEY), full.root / "jobs" / KEY):
        path.mkdir(exist_ok=True)
        os.utime(path, (old, old))
    maintenance.gc(full, set())
    assert list((full.root / "scratch").iterdir()) == []
    assert list((full.root / "jobs").iterdir()) == []


def test_what_was_used_longest_ago_goes_first(full: Store) -> None:
    assert full.find(KEYS[0]) is not None  # used now
    one = _bytes(full) // 4
    done = maintenance.gc(full, set(), 2 * one + 10)
    assert [entry.name for entry in done.removed] == [KEYS[1], KEYS[2]]
    assert done.kept_bytes == _bytes(full)
    assert done.freed_bytes >= 2 * SIZE
    assert Store(full.root).find(KEYS[0]) is not None


def test_what_is_kept_or_locked_stays(full: Store) -> None:
    with full.lock(KEYS[1]):
        maintenance.gc(full, {KEYS[0]}, 0)
    assert full.keys() == tuple(sorted(KEYS[:2]))
    assert list((full.root / "tmp").iterdir()) == []


def test_a_dry_run_removes_nothing(full: Store) -> None:
    done = maintenance.gc(full, set(), 0, dry_run=True)
    assert len(done.removed) == 4
    assert len(full.keys()) == 4


def test_fsck_reads_everything_again(full: Store) -> None:
    assert maintenance.fsck(full) == {}
    path = full.artifact_path(KEYS[2]) / "sub" / "weights"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    (full.artifact_path(KEYS[3]) / NAME).unlink()
    file = full.staging(KEY) / "member" / "a.gguf"
    file.parent.mkdir()
    file.write_bytes(b"abc")
    digest, kept = downloads.keep(full, file)
    kept.write_bytes(b"abd")
    found = maintenance.fsck(full)
    assert set(found) == {KEYS[2], KEYS[3], digest}
    assert [str(one) for one in found[KEYS[2]]] == ["sub/weights: sha256 differs"]
    assert full.keys() == tuple(sorted(KEYS[:2]))
    assert maintenance.fsck(full) == {}


app = typer.Typer()
app.command()(verify)
app.add_typer(cache, name="cache")


def run(*arguments: str | Path) -> str:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).stdout


def test_verify_says_what_differs(full: Store) -> None:
    path = full.artifact_path(KEYS[0])
    assert "2 files, 100.0 KiB, all as sealed" in run("verify", path)
    assert json.loads(run("verify", path, "--json")) == {
        "ok": True,
        "files": 2,
        "size_bytes": SIZE,
        "damage": [],
        "unsealed": [],
    }
    (path / "config.json").write_text("[]")
    (path / "added.py").write_text("")
    with pytest.raises(IntegrityError, match="2 files differ"):
        run("verify", path)
    result = CliRunner().invoke(app, ["verify", str(path), "--json"])
    assert isinstance(result.exception, IntegrityError)
    told = json.loads(result.stdout)
    assert told["ok"] is False
    assert told["damage"] == [
        {"path": "added.py", "what": "not in the manifest"},
        {"path": "config.json", "what": "sha256 differs"},
    ]


def test_verify_needs_something_sealed(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="never finished"):
        run("verify", tmp_path)
    with pytest.raises(InputMissingError, match="not a directory"):
        run("verify", tmp_path / "nothing")


def test_the_cache_on_the_command_line(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIKIT_HOME", str(full.root))
    listed = json.loads(run("cache", "list", "--json"))
    assert [entry["name"] for entry in listed["entries"]] == KEYS
    assert listed["entries"][0]["what"] == "quantize rtn, 2 s to make"
    assert KEYS[0][:12] in run("cache", "list")
    assert "4 artifacts, all as sealed" in run("cache", "check")
    assert "would remove artifact" in run("cache", "gc", "--max-size", "0", "--dry-run")
    kept = json.loads(run("cache", "gc", "--max-size", "0MB", "--keep", KEYS[2][:10], "--json"))
    assert [entry["name"] for entry in kept["removed"]] == [KEYS[0], KEYS[1], KEYS[3]]
    assert full.keys() == (KEYS[2],)
    (full.artifact_path(KEYS[2]) / "config.json").unlink()
    with pytest.raises(IntegrityError, match="1 of the store's entries"):
        run("cache", "check")
    with pytest.raises(UsageError, match="not a size"):
        run("cache", "gc", "--max-size", "much")
    with pytest.raises(InputMissingError, match="no such entry"):
        run("cache", "gc", "--keep", "zzz")
