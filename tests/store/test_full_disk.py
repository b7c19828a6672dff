"""Disks that really fill up: the error says what is missing, and nothing half-written stays."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from optikit.errors import DiskError, Exit
from optikit.store import files
from optikit.store.store import Store
from tests.store.artifacts import KEY, MANIFEST, WRITE, commit, fill
from tests.store.conftest import Child


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield mount
    gc.collect()  # a store holds what it found as long as it lives
    subprocess.run(["umount", str(mount)], check=True)


def _fill_up(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"\0" * 4096)
        except OSError:
            return


def test_no_room_for_the_seal(small_disk: Path) -> None:
    store = Store(small_disk / "store")
    directory = store.staging(KEY)
    fill(directory)
    _fill_up(small_disk)
    with pytest.raises(DiskError, match="0 B free") as raised:
        store.commit(KEY, directory, MANIFEST)
    assert raised.value.code == Exit.IO
    assert "optikit cache gc" in raised.value.fix
    assert store.keys() == ()
    assert list((store.root / "tmp").iterdir()) == []
    (small_disk / "filler").unlink()
    commit(store)
    assert Store(store.root).find(KEY) is not None


def test_no_room_for_an_export(small_disk: Path, store: Store) -> None:
    artifact = commit(store)
    (small_disk / "filler").write_bytes(b"\0" * 1_000_000)
    with pytest.raises(DiskError, match=r"needs 100.0 KiB.* free"):
        store.export(artifact, small_disk / "model")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_no_room_even_for_the_store(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,nr_inodes=1", str(small_disk)], check=True)
    with pytest.raises(DiskError, match="No space left"):
        Store(small_disk / "store")


def test_a_file_size_limit_in_the_middle_of_an_export(store: Store, child: Child) -> None:
    commit(store)
    code = f"""
import resource, sys
from pathlib import Path
from optikit.errors import OptikitError
from optikit.store import files
from optikit.store.store import Store
store = Store(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    store.export(store.find({KEY!r}), Path(sys.argv[2]))
except OptikitError as error:
    print(error.message, file=sys.stderr)
    sys.exit(int(error.code))
"""
    dest = store.root.parent / "out"
    process = child(code, store.root, dest)
    _, stderr = process.communicate()
    assert process.returncode == Exit.IO, stderr
    assert "needs 100.0 KiB" in stderr
    assert [path.name for path in dest.parent.iterdir()] == ["store"]


def test_a_file_size_limit_while_sealing(tmp_path: Path, child: Child) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (103_000, 103_000))\n" + WRITE.replace(
        "MANIFEST)", "Manifest(facts={'text': 'x' * 200_000}))"
    )
    process = child(code, tmp_path)
    _, stderr = process.communicate("go\n")
    assert process.returncode == Exit.IO, stderr
    assert Store(tmp_path).keys() == ()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_half_written_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIKIT_TESTING", "1")
    monkeypatch.setenv("OPTIKIT_FAULT", "mid_write:enospc")
    (tmp_path / "kept").write_text("older")
    with pytest.raises(OSError, match="No space"):
        files.write_whole(tmp_path / "kept", b"newer")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "older"
