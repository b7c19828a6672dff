"""Reading verifies: whatever was changed, cut, removed or added is noticed, set aside and made again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optikit.errors import CannotCreateError, IntegrityError, RefusedError
from optikit.store.digests import Digests
from optikit.store.manifest import NAME, Manifest, load, seal
from optikit.store.store import Store
from tests.store.artifacts import FILES, KEY, commit, contents


def _flip(path: Path) -> None:
    content = bytearray((path / "sub" / "weights").read_bytes())
    content[1000] ^= 1
    (path / "sub" / "weights").write_bytes(content)


def _flip_and_restore_the_time(path: Path) -> None:
    before = (path / "sub" / "weights").stat()
    _flip(path)
    os.utime(path / "sub" / "weights", ns=(before.st_atime_ns, before.st_mtime_ns))


def _truncate(path: Path) -> None:
    os.truncate(path / "sub" / "weights", 10)


def _delete(path: Path) -> None:
    (path / "config.json").unlink()


def _add(path: Path) -> None:
    (path / "modeling.py").write_text("import os")


def _link(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "config.json").symlink_to("/etc/hostname")


def _no_manifest(path: Path) -> None:
    (path / NAME).unlink()


def _torn_manifest(path: Path) -> None:
    os.truncate(path / NAME, 40)


def _manifest_of_another(path: Path) -> None:
    loaded = json.loads((path / NAME).read_text())
    (path / NAME).write_text(json.dumps(loaded | {"key": "f" * 64}))


def _manifest_from_the_future(path: Path) -> None:
    loaded = json.loads((path / NAME).read_text())
    (path / NAME).write_text(json.dumps(loaded | {"schema_version": 99}))


def _deep_manifest(path: Path) -> None:
    (path / NAME).write_text("[" * 100_000)


DAMAGE = [
    _flip,
    _flip_and_restore_the_time,
    _truncate,
    _delete,
    _add,
    _link,
    _no_manifest,
    _torn_manifest,
    _manifest_of_another,
    _manifest_from_the_future,
    _deep_manifest,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_set_aside_and_counts_as_absent(damage: Callable[[Path], None], tmp_path: Path) -> None:
    told: list[str] = []
    path = commit(Store(tmp_path)).path
    assert Store(tmp_path).find(KEY) is not None  # the digests are remembered by now
    damage(path)
    store = Store(tmp_path, warn=told.append)
    assert store.find(KEY) is None
    assert not path.exists()
    assert len(list((tmp_path / "corrupt").iterdir())) == 1
    assert len(told) == 1
    assert "damaged" in told[0]
    assert store.find(KEY) is None
    commit(store)
    assert Store(tmp_path).find(KEY) is not None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(at=st.integers(0, 102399), value=st.integers(1, 255))
def test_any_changed_byte_is_noticed(at: int, value: int, tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = store.find(KEY) or commit(store)
    content = bytearray((artifact.path / "sub" / "weights").read_bytes())
    content[at] ^= value
    (artifact.path / "sub" / "weights").write_bytes(content)
    assert Store(tmp_path, warn=lambda _: None).find(KEY) is None


def test_size_alone_can_be_asked_for(tmp_path: Path) -> None:
    path = commit(Store(tmp_path)).path
    _flip(path)
    assert Store(tmp_path).find(KEY, verify="size") is not None
    _truncate(path)
    assert Store(tmp_path).find(KEY, verify="size") is None


def test_after_the_first_time_only_sizes_are_compared(store: Store) -> None:
    path = commit(store).path
    _flip(path)
    assert store.find(KEY) is not None, "this process wrote it and needn't read it again"
    _truncate(path)
    assert store.find(KEY) is None
    commit(store)
    reader = Store(store.root)
    assert reader.find(KEY) is not None
    _flip(path)
    assert reader.find(KEY) is not None, "this process has read it"


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "a//b", "./a", "a/", ""])
def test_a_manifest_that_names_files_outside_is_refused(name: str, tmp_path: Path) -> None:
    row = {"size": 1, "sha256": "0" * 64}
    (tmp_path / NAME).write_text(json.dumps({"schema_version": 1, "files": {name: row}}))
    with pytest.raises(IntegrityError, match="leaves the directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "null", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 1, "files": {"a": 1}}', "\xff"]
)
def test_a_manifest_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content.encode("latin-1"))
    with pytest.raises(IntegrityError):
        load(tmp_path)


def test_a_warm_read_reads_no_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optikit.store.digests.WORTH_REMEMBERING", 1)
    path = commit(Store(tmp_path)).path
    past = path.stat().st_mtime - 10
    for name in FILES:
        os.utime(path / name, (past, past))  # changes the inode's change time, so it is hashed once more
    _settle(tmp_path)
    assert Store(tmp_path).find(KEY) is not None

    def refuse(*_: object) -> str:
        pytest.fail("a file was read although nothing changed")

    monkeypatch.setattr("optikit.store.digests.sha256", refuse)
    assert Store(tmp_path).find(KEY) is not None


def _settle(directory: Path) -> None:
    """Wait until the clock has moved on from the last change, by watching it rather than by guessing."""
    import time

    while time.time_ns() - max(p.stat().st_ctime_ns for p in directory.rglob("*")) < 50_000_000:
        time.sleep(0.005)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"/x": [1]}', '{"/x": "y"}', "[" * 100_000, "\x00"])
def test_a_broken_memory_of_digests_costs_only_time(content: str, tmp_path: Path) -> None:
    (tmp_path / "digests.json").write_text(content)
    (tmp_path / "file").write_text("x")
    digests = Digests(tmp_path / "digests.json")
    assert digests.of(tmp_path / "file").startswith("2d711642")
    digests.save()


@pytest.mark.parametrize("damage", ["bit", "torn", "empty", "directory", "link", "pipe"])
def test_damage_of_the_memory_of_digests_is_told_and_healed(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optikit.store.digests.WORTH_REMEMBERING", 0)
    path, file = tmp_path / "digests.json", tmp_path / "file"
    file.write_text("x")
    _settle(tmp_path)
    told: list[str] = []

    def fresh() -> Digests:
        return Digests(path, warn=told.append)

    first = fresh()
    digest = first.of(file)
    first.save()
    content = path.read_text()
    assert digest in content
    wrong = content.replace(digest, digest.replace(digest[0], "0" if digest[0] != "0" else "1", 1))
    if damage in ("bit", "torn", "empty"):
        path.write_text({"bit": wrong, "torn": content[:-9], "empty": ""}[damage])
    else:
        path.unlink()
        {"directory": path.mkdir, "link": lambda: path.symlink_to(file), "pipe": lambda: os.mkfifo(path)}[damage]()
    again = fresh()
    assert again.of(file) == digest
    assert len(told) == 1
    assert file.read_text() == "x"
    again.save()
    assert json.loads(path.read_text())["entries"]
    assert fresh().of(file) == digest
    assert len(told) == 1


@pytest.mark.parametrize("what", ["file", "link", "pipe", "empty directory"])
def test_something_else_in_an_artifacts_place_is_set_aside(what: str, tmp_path: Path) -> None:
    path, moved = commit(Store(tmp_path)).path, tmp_path / "moved"
    path.rename(moved)
    make = {"file": path.touch, "link": lambda: path.symlink_to(moved), "pipe": lambda: os.mkfifo(path)}
    make.get(what, path.mkdir)()
    store = Store(tmp_path)
    assert store.find(KEY) is None
    assert len(store.warnings) == 1
    assert commit(store).path == path
    assert store.find(KEY) is not None
    assert (moved / NAME).is_file()


def test_a_file_changed_right_after_it_was_hashed_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for round_ in range(200):
        digests = Digests(tmp_path / "digests.json")
        path.write_text(f"{round_:05}")
        first = digests.of(path)
        path.write_text(f"{round_ + 50000:05}")  # same size, most often within the same tick of the clock
        assert digests.of(path) != first


def test_a_file_that_was_just_written_is_not_trusted_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one step of the clock a file can change again and look the same."""
    monkeypatch.setattr("optikit.store.digests.WORTH_REMEMBERING", 1)
    path = tmp_path / "file"
    path.write_text("x")
    digests = Digests(tmp_path / "digests.json")
    digests.of(path)
    assert digests._new == {}
    _settle(tmp_path)
    digests.of(path)
    assert list(digests._new) == [str(path)]


def _rot(path: Path) -> None:
    """Flip a bit as a bad disk would: size and times stay."""
    found = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_a_bit_lost_by_the_disk_is_found_in_small_files_at_once_and_in_large_ones_before_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optikit.store.digests.WORTH_REMEMBERING", 1000)  # config.json is small, the weights are large
    monkeypatch.setattr("optikit.store.digests._identity", lambda stat: [stat.st_size, stat.st_mtime_ns, 0, 0])
    path = commit(Store(tmp_path)).path
    _settle(tmp_path)
    assert Store(tmp_path).find(KEY) is not None  # remembered
    _rot(path / "sub" / "weights")
    store = Store(tmp_path)
    found = store.find(KEY)
    assert found is not None  # this is what a memory of stats can't see
    with pytest.raises(IntegrityError, match="sub/weights: sha256 differs"):
        store.require_intact(found)
    assert store.find(KEY) is None
    path = commit(Store(tmp_path)).path
    _settle(tmp_path)
    assert Store(tmp_path).find(KEY) is not None
    _rot(path / "config.json")
    assert Store(tmp_path).find(KEY) is None


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_seal_is_damage_or_changes_nothing(at: int, bit: int, sealed: Path) -> None:
    content = bytearray((sealed / NAME).read_bytes())
    before = load(sealed)
    content[at % len(content)] ^= 1 << bit
    other = sealed.with_name("other")
    other.mkdir(exist_ok=True)
    (other / NAME).write_bytes(content)
    try:
        assert load(other) == before  # white space, or another way to write the same number
    except IntegrityError as error:
        assert "can't be read" in error.message  # noqa: PT017  either way is right


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    facts = {"perplexity": 12.25, "steps": {10: 1e-7, 2: "zwölf"}, "none": None, "many": [True, 0.1 + 0.2]}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(b"x")
    seal(tmp_path / "a", Manifest(verb="measure", method="quality", traits=("int4_gptq",), facts=facts))
    return tmp_path / "a"


def test_a_seal_of_the_version_before_is_still_read(sealed: Path) -> None:
    values = json.loads((sealed / NAME).read_text())
    del values["self_sha256"]
    (sealed / NAME).write_text(json.dumps(values))
    with pytest.raises(IntegrityError, match="self_sha256"):
        load(sealed)
    (sealed / NAME).write_text(json.dumps(values | {"schema_version": 1}))
    assert load(sealed).facts["perplexity"] == 12.25


def test_export_copies_and_replaces(store: Store, tmp_path: Path) -> None:
    artifact = commit(store)
    dest = tmp_path / "out" / "model"
    dest.parent.mkdir()
    dest.mkdir()
    (dest / "older").write_text("x")
    store.export(artifact, dest)
    assert contents(dest) == FILES
    for name in FILES:
        assert (dest / name).stat().st_ino != (artifact.path / name).stat().st_ino
    assert [path.name for path in dest.parent.iterdir()] == ["model"]


def test_export_refuses_what_changed_and_leaves_the_older_one(store: Store, tmp_path: Path) -> None:
    artifact = commit(store)
    dest = tmp_path / "model"
    dest.mkdir()
    (dest / "older").write_text("x")
    _flip(artifact.path)
    with pytest.raises(IntegrityError, match="weights changed"):
        store.export(artifact, dest)
    assert contents(dest) == {"older": b"x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "store"]


def test_the_store_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = Store(tmp_path / "store")
    finally:
        os.umask(before)
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in store.root.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
@pytest.mark.parametrize("name", ["", "artifacts", "downloads", "environments"])
def test_a_store_that_others_may_write_to_is_refused(name: str, mode: int, tmp_path: Path) -> None:
    """What lies in a store is believed, and its environments are executed."""
    path = Store(tmp_path / "store").root / name
    path.mkdir(exist_ok=True)
    path.chmod(mode)
    with pytest.raises(RefusedError, match="may write") as raised:
        Store(tmp_path / "store")
    assert raised.value.fix == f"chmod go-w {path}"
    path.chmod(0o755)
    Store(tmp_path / "store")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize("name", ["", "artifacts", "environments"])
def test_a_store_of_another_user_is_refused(name: str, tmp_path: Path) -> None:
    path = Store(tmp_path / "store").root / name
    path.mkdir(exist_ok=True)
    os.chown(path, 65534, -1)
    with pytest.raises(RefusedError, match="belongs to user 65534"):
        Store(tmp_path / "store")


def test_a_store_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreateError):
        Store(tmp_path / "file")
    with pytest.raises(CannotCreateError):
        Store(tmp_path / "file" / "below")


def test_the_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "a"))
    assert Store.default().root == tmp_path / "a"
    monkeypatch.delenv("OPTIKIT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert Store.default().root == tmp_path / "b" / "optikit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert Store.default().root == tmp_path / "c" / ".cache" / "optikit"
