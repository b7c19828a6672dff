"""Collecting and checking: nothing that is in use goes, nothing damaged stays, and what remains is whole."""

from __future__ import annotations

import hashlib
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
from tests.store.conftest import Child

KEYS = [cache_key(number=number) for number in range(4)]
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def full(tmp_path: Path) -> Store:
    """Four artifacts, made by a store object that is gone; the first was used longest ago."""
    for age, key in enumerate(KEYS):
        path = commit(Store(tmp_path / "store"), key).path
        os.utime(path, (1000 + age, 1000 + age))
    return Store(tmp_path / "store")


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


HOLD = """
import sys
from pathlib import Path
from optikit.store.store import Store
store = Store(Path(sys.argv[1]))
found = store.find(sys.argv[2])
print("found", flush=True)
sys.stdin.readline()
"""


def test_what_a_running_process_found_stays_until_it_ends(full: Store, child: Child) -> None:
    holder = child(HOLD, full.root, KEYS[1])
    assert holder.stdout is not None
    assert holder.stdout.readline() == "found\n"
    done = maintenance.gc(full, set(), 0)
    assert full.keys() == (KEYS[1],)
    assert [entry.name for entry in done.in_use] == [KEYS[1]]
    assert done.kept_bytes == _bytes(full) > SIZE
    assert json.loads(run_in(full, "cache", "gc", "--max-size", "0", "--json"))["in_use"] == [KEYS[1]]
    assert "1 more (" in run_in(full, "cache", "gc", "--max-size", "0", "--dry-run")
    holder.kill()
    holder.wait()
    assert [entry.name for entry in maintenance.gc(full, set(), 0).removed] == [KEYS[1]]
    assert full.keys() == ()


def test_texts_and_files_that_a_process_found_stay(store: Store) -> None:
    texts = [f"text {number}".encode() for number in range(2)]
    digests = [hashlib.sha256(text).hexdigest() for text in texts]
    for text, digest in zip(texts, digests, strict=True):
        downloads.keep_text(Store(store.root), text, digest)
    staging = (other := Store(store.root)).staging(KEY)
    (staging / "a.gguf").write_bytes(b"abc")
    digest, kept = downloads.keep(other, staging / "a.gguf")
    used = downloads.find_text(store, digests[0])
    maintenance.gc(store, set(), 0)
    assert used is not None
    assert used.read_bytes() == texts[0]
    assert downloads.find_text(store, digests[1]) is None
    assert kept.read_bytes() == b"abc"
    del other
    maintenance.gc(store, set(), 0)
    assert downloads.find(store, digest) is None


READ = """
import sys, time
from pathlib import Path
from optikit.store.store import Store
from tests.store.artifacts import FILES, contents
root, seen, absent = Path(sys.argv[1]), 0, 0
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    found = Store(root).find(sys.argv[2])  # a store of its own each time: nothing is held in between
    if found is None:
        absent += 1
        continue
    store = Store(root)
    found = store.find(sys.argv[2])
    if found is not None:
        time.sleep(0.002)
        assert {name: data for name, data in contents(found.path).items() if name in FILES} == FILES
        seen += 1
    del store
print(seen, absent, flush=True)
"""


def test_what_is_found_can_be_read_while_others_collect_and_make_it_again(tmp_path: Path, child: Child) -> None:
    root = tmp_path / "store"
    readers = [child(READ, root, KEY, "3") for _ in range(2)]
    collected = 0
    while any(reader.poll() is None for reader in readers):
        commit(Store(root))
        done = maintenance.gc(Store(root), set(), 0)
        collected += len(done.removed)
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stderr is not None
        seen = [int(number) for number in reader.stdout.read().split()]
        assert seen, reader.stderr.read()
        assert seen[0] > 0
    assert collected > 0
    assert list((root / "corrupt").iterdir()) == [], "nothing was taken for damaged"


def test_what_others_left_half_written_goes_in_the_end(full: Store) -> None:
    old = time.time() - maintenance.ABANDONED_SECONDS - 10
    foreign = full.root / "tmp" / f"{'0' * 16}-7-{'0' * 8}-1@another"
    fresh, other = foreign.with_name(f"{foreign.name}-2"), foreign.with_name("of another version")
    for path in (foreign, fresh, other):
        path.mkdir()
    for path in (foreign, other):
        os.utime(path, (old, old))
    maintenance.gc(Store(full.root), set())
    assert list((full.root / "tmp").iterdir()) == [fresh]


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


def run_in(store: Store, *arguments: str) -> str:
    env = {"OPTIKIT_HOME": str(store.root)}
    return CliRunner().invoke(app, list(arguments), env=env, catch_exceptions=False).stdout


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


def test_lists_need_no_seal_that_holds_and_say_what_they_cannot_read(full: Store) -> None:
    changed, torn = (full.artifact_path(key) / NAME for key in KEYS[:2])
    changed.write_text(changed.read_text(encoding="utf-8").replace('"rtn"', '"gptq"'), encoding="utf-8")
    torn.write_text("{", encoding="utf-8")
    told = [maintenance.describe(entry) for entry in maintenance.entries(full)]
    assert told[0] == "quantize gptq, 2 s to make"
    assert "can't be read" in told[1]
    assert maintenance.fsck(full).keys() == set(KEYS[:2])


def test_looking_for_locks_leaves_no_lock_files(full: Store) -> None:
    before = sorted((full.root / "locks").iterdir())
    maintenance.gc(full, set(), 0, dry_run=True)
    assert sorted((full.root / "locks").iterdir()) == before
