"""Archives of artifacts: what comes in is what went out, or nothing comes in."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from optikit.cli.cache import app
from optikit.errors import InputMissingError, IntegrityError, OptikitError, RefusedError, UsageError
from optikit.store import archive
from optikit.store.manifest import NAME, Manifest
from optikit.store.store import Store, cache_key
from tests.store.artifacts import FILES, commit, contents

KEYS = [cache_key(number=number) for number in range(2)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A store of two artifacts, and all of it in an archive: treat as read-only."""
    place = tmp_path_factory.mktemp("exported")
    store = Store(place / "store")
    for key in KEYS:
        commit(store, key)
    archive.export(store, KEYS, place / "all.tar")
    return store, place / "all.tar"


def empty(store: Store) -> bool:
    return store.keys() == () and not [*(store.root / "tmp").iterdir(), *(store.root / "corrupt").iterdir()]


def test_what_comes_in_is_what_went_out(exported, store):
    source, path = exported
    assert [artifact.key for artifact in archive.bring_in(store, path)] == KEYS
    for key in KEYS:
        found = Store(store.root).find(key)
        assert found is not None
        assert contents(found.path) == contents(source.artifact_path(key))
        assert found.manifest == source.find(key).manifest
    archive.bring_in(store, path)  # again: those that are there stay
    assert len(store.keys()) == 2


def test_an_archive_tells_nothing_of_this_machine(exported):
    with tarfile.open(exported[1]) as tar:
        assert {(each.uid, each.gid, each.uname, each.mtime, each.mode) for each in tar} == {(0, 0, "", 0, 0o600)}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_cut_archive_is_refused_whole(exported, tmp_path_factory, data):
    whole = exported[1].read_bytes()
    with tarfile.open(exported[1]) as tar:
        borders = [each.offset for each in tar]
    length = data.draw(st.one_of(st.sampled_from(borders), st.integers(0, last(whole) + 1023)))
    store = Store(tmp_path_factory.mktemp("cut"))
    path = store.root.parent / f"cut-{length}.tar"
    path.write_bytes(whole[:length])
    with pytest.raises(IntegrityError):
        archive.bring_in(store, path)
    path.unlink()
    assert empty(store)


def last(whole: bytes) -> int:
    """Return where the last file's block ends: after it there are only zeros, of which two blocks are asked for."""
    end = len(whole.rstrip(b"\0"))
    return end + -end % 512


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_never_brings_in_other_content(exported, tmp_path_factory, data):
    source, path = exported
    whole = bytearray(path.read_bytes())
    whole[data.draw(st.integers(0, last(bytes(whole)) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    store = Store(tmp_path_factory.mktemp("flipped"))
    changed = store.root.parent / f"{store.root.name}.tar"
    changed.write_bytes(whole)
    try:
        archive.bring_in(store, changed)
    except IntegrityError:
        assert empty(store)
    else:  # in what isn't content, as a checksum's padding
        assert all(contents(store.artifact_path(key)) == contents(source.artifact_path(key)) for key in KEYS)
    changed.unlink()


def test_a_file_of_the_right_size_with_other_bytes_is_refused(exported, store, tmp_path):
    whole = exported[1].read_bytes()
    content = FILES["sub/weights"]
    assert whole.count(content) == 2
    place = whole.rindex(content)
    path = tmp_path / "changed.tar"
    path.write_bytes(whole[:place] + bytes(len(content)) + whole[place + len(content) :])
    with pytest.raises(IntegrityError, match=r"isn't as it was sealed: sub/weights"):
        archive.bring_in(store, path)
    assert empty(store)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", f"{KEYS[0]}/../../x", f"{KEYS[0]}//x", KEYS[0], f"{KEYS[0]}/.", f"{KEYS[0]}/a/../x"]
)
def test_a_name_that_leaves_its_place_is_refused(store, tmp_path, name):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(IntegrityError, match="no file of an artifact"):
        archive.bring_in(store, tmp_path / "a.tar")
    assert empty(store)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_only_plain_files_come_in(store, tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo(f"{KEYS[0]}/x")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(IntegrityError, match="no file of an artifact"):
        archive.bring_in(store, tmp_path / "a.tar")
    assert empty(store)


def test_a_seal_of_another_key_is_refused(exported, store, tmp_path):
    path = tmp_path / "other.tar"
    path.write_bytes(exported[1].read_bytes())
    with tarfile.open(exported[1]) as tar, tarfile.open(path, "w") as out:
        for member in tar:
            if member.name.startswith(KEYS[0]):
                content = tar.extractfile(member)
                member.name = KEYS[1] + member.name.removeprefix(KEYS[0])
                out.addfile(member, content)
    with pytest.raises(IntegrityError, match="has the seal of"):
        archive.bring_in(store, path)
    assert empty(store)


def test_a_credential_stays_here(store, tmp_path):
    directory = store.staging(KEYS[0])
    (directory / "config.json").write_text("{}")
    store.commit(KEYS[0], directory, Manifest(verb="x", method="y", options={"draft": "https://me:pw-123@host/m"}))
    with pytest.raises(RefusedError, match=NAME):
        archive.export(store, KEYS[:1], tmp_path / "a.tar")
    assert not list(tmp_path.glob("*.tar"))


def test_the_command_line(exported, tmp_path):
    source, _ = exported

    def run(home: Path, *arguments: str | Path) -> str:
        words = [str(word) for word in arguments]
        done = CliRunner().invoke(app, words, env={"OPTIKIT_HOME": str(home)}, catch_exceptions=False)
        return done.stdout

    tar = tmp_path / "one.tar"
    assert run(source.root, "export", tar, KEYS[1][:8]).startswith("1 artifacts, 100.0 KiB, written to")
    assert json.loads(run(tmp_path / "other", "import", tar, "--json"))["artifacts"] == [KEYS[1]]
    assert Store(tmp_path / "other").keys() == (KEYS[1],)
    for arguments, error in (
        (("export", tmp_path / "a.zip"), UsageError),
        (("export", tar, "zzz"), InputMissingError),
        (("export", tmp_path / "no" / "such" / "a.tar"), OptikitError),
        (("import", tmp_path / "none.tar"), InputMissingError),
        (("import", Path(__file__)), IntegrityError),
    ):
        with pytest.raises(error):
            run(source.root, *arguments)
