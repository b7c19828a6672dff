"""The commit protocol, with real kills: the artifact is there whole, or not at all, and the next run succeeds."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from optikit.errors import Exit, RefusedError
from optikit.store.manifest import NAME, load
from optikit.store.store import Manifest, Store
from tests.store.artifacts import FILES, KEY, MANIFEST, WRITE, commit, contents, fill
from tests.store.conftest import Child

POINTS = ("before_write", "mid_write", "before_manifest", "before_rename", "after_rename")


def test_an_artifact_is_found_as_it_was_written(store: Store) -> None:
    assert store.find(KEY) is None
    artifact = commit(store)
    found = store.find(KEY)
    assert found == artifact
    assert found is not None
    files = contents(found.path)
    assert NAME in files
    assert {name: files[name] for name in FILES} == FILES
    assert found.manifest.facts == {"layers": 2}
    assert found.manifest.traits == ("int4_gptq",)
    assert found.manifest.size_bytes == sum(map(len, FILES.values()))
    assert store.keys() == (KEY,)
    assert list((store.root / "tmp").iterdir()) == []


def test_scratch_is_kept_until_the_commit(store: Store) -> None:
    (store.scratch(KEY) / "block").write_text("half")
    assert (Store(store.root).scratch(KEY) / "block").read_text() == "half"
    commit(store)
    assert not (store.root / "scratch" / KEY).exists()


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_the_store_is_whole_and_the_next_run_succeeds(point: str, tmp_path: Path, child: Child) -> None:
    whole = contents(commit(Store(tmp_path / "never-killed")).path)
    root = tmp_path / "store"
    process = child(WRITE, root, OPTIKIT_TESTING="1", OPTIKIT_FAULT=f"{point}:sigkill")
    process.communicate("go\n")
    assert process.returncode == -signal.SIGKILL
    left = Store(root)
    assert list((root / "tmp").iterdir()) == []
    found = left.find(KEY)
    assert left.warnings == []
    assert (found is not None) is (point == "after_rename")
    assert (left.scratch(KEY) / "block-0").read_text() == "half-done"
    assert sorted(contents(commit(left).path)) == sorted(whole)
    again = Store(root).find(KEY)
    assert again is not None
    assert again.manifest.files == load(tmp_path / "never-killed" / "artifacts" / KEY).files


@pytest.mark.parametrize("point", POINTS[:-1])
def test_a_full_disk_anywhere_is_named_and_leaves_nothing(point: str, tmp_path: Path, child: Child) -> None:
    process = child(WRITE, tmp_path, OPTIKIT_TESTING="1", OPTIKIT_FAULT=f"{point}:enospc")
    _, stderr = process.communicate("go\n")
    assert process.returncode == Exit.IO
    assert "free" in stderr
    assert "optikit cache gc" in stderr
    assert list((tmp_path / "tmp").iterdir()) == []
    assert Store(tmp_path).keys() == ()
    commit(Store(tmp_path))


def test_faults_need_the_testing_switch(tmp_path: Path, child: Child) -> None:
    process = child(WRITE, tmp_path, OPTIKIT_TESTING="", OPTIKIT_FAULT="before_write:sigkill")
    process.communicate("go\n")
    assert process.returncode == 0


def test_killed_at_random_moments(tmp_path: Path, child: Child) -> None:
    draw = random.Random(0)
    for _ in range(12):
        root = tmp_path / str(draw.random())
        process = child(WRITE, root)
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(draw.uniform(0, 0.012))
        process.kill()
        process.wait()
        store = Store(root)
        found = store.find(KEY)
        assert store.warnings == []
        assert store.keys() == ((KEY,) if found else ())
        assert list((root / "tmp").iterdir()) == []


def test_writers_at_the_same_time_converge(tmp_path: Path, child: Child) -> None:
    writers = [child(WRITE, tmp_path) for _ in range(4)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    told = [writer.communicate("go\n") for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4, told
    assert len({stdout for stdout, _ in told}) == 1
    store = Store(tmp_path)
    assert store.find(KEY) is not None
    assert store.keys() == (KEY,)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_first_writer_wins_and_the_second_is_discarded(store: Store) -> None:
    first = commit(store)
    directory = store.staging(KEY)
    (directory / "other").write_text("different")
    second = store.commit(KEY, directory, MANIFEST)
    assert second.manifest == first.manifest
    assert not directory.exists()


def test_a_damaged_artifact_in_the_way_is_replaced(store: Store) -> None:
    path = commit(store).path
    (path / "config.json").write_bytes(b"[]")
    fresh = Store(store.root)
    artifact = commit(fresh)
    assert contents(artifact.path)["config.json"] == b"{}"
    assert len(fresh.warnings) == 1
    assert len(list((store.root / "corrupt").iterdir())) == 1


@pytest.mark.parametrize("name", ["ä ö.txt", "line\nbreak", "-rf", " ", "a\\b", "\udcff", "😀", "artifact.json.part"])
def test_any_file_name_survives(name: str, store: Store) -> None:
    directory = store.staging(KEY)
    (directory / name).write_text("content")
    store.commit(KEY, directory, Manifest())
    found = Store(store.root).find(KEY)
    assert found is not None
    assert list(found.manifest.files) == [name]


def _symlink(directory: Path) -> None:
    (directory / "link").symlink_to("/etc/passwd")


def _directory_link(directory: Path) -> None:
    (directory / "link").symlink_to("/etc", target_is_directory=True)


def _loop(directory: Path) -> None:
    (directory / "link").symlink_to(directory)


def _pipe(directory: Path) -> None:
    import os

    os.mkfifo(directory / "pipe")


@pytest.mark.parametrize("spoil", [_symlink, _directory_link, _loop, _pipe])
def test_only_plain_files_are_stored(spoil: object, store: Store) -> None:
    directory = store.staging(KEY)
    fill(directory)
    assert callable(spoil)
    spoil(directory)
    with pytest.raises(RefusedError, match="not a regular file"):
        store.commit(KEY, directory, MANIFEST)
    assert store.keys() == ()
    assert not directory.exists()
    assert Path("/etc/passwd").exists()


def test_a_seal_copied_from_the_source_is_replaced(store: Store) -> None:
    directory = store.staging(KEY)
    fill(directory)
    (directory / NAME).write_text("{}")
    store.commit(KEY, directory, MANIFEST)
    found = Store(store.root).find(KEY)
    assert found is not None
    assert NAME not in found.manifest.files


@pytest.mark.parametrize("key", ["", "../../etc", "A" * 64, "a" * 63])
def test_what_is_no_key_never_becomes_a_path(key: str, store: Store) -> None:
    for use in (store.find, store.staging, store.scratch, store.job_dir):
        with pytest.raises(ValueError, match="not a key"):
            use(key)
