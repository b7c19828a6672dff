"""Locks: one process at a time, and the kernel frees them when their holder dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optikit.errors import Exit, LockedError
from optikit.store.store import Store
from tests.store.artifacts import KEY, WRITE
from tests.store.conftest import Child

HOLD = """
import sys
from pathlib import Path
from optikit.store.store import Store
from tests.store.artifacts import KEY
with Store(Path(sys.argv[1])).lock(KEY):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_waiter_is_told_who_holds_it_and_gives_up(store: Store, child: Child) -> None:
    holder = child(HOLD, store.root)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    told: list[str] = []
    by = f"process {holder.pid} on {os.uname().nodename}"
    with pytest.raises(LockedError, match=by) as raised, store.lock(KEY, timeout=0.1, waiting=told.append):
        pytest.fail("two processes hold one lock")
    assert raised.value.code == Exit.LOCKED
    assert str(holder.pid) in told[0]


def test_killing_the_holder_frees_the_lock(store: Store, child: Child) -> None:
    holder = child(HOLD, store.root)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    with store.lock(KEY, timeout=5):
        assert time.monotonic() - started < 2


def test_a_waiter_goes_on_when_the_holder_ends(store: Store, child: Child) -> None:
    holder = child(HOLD, store.root)
    assert holder.stdout is not None
    holder.stdout.readline()

    def let_go(_: str) -> None:
        assert holder.stdin is not None
        holder.stdin.write("\n")
        holder.stdin.flush()

    with store.lock(KEY, waiting=let_go):
        assert holder.wait(10) == 0
    with store.lock(KEY, timeout=0):
        pass


def test_locks_of_different_keys_are_independent(store: Store) -> None:
    with store.lock(KEY), store.lock("0" * 64, timeout=0):
        pass


def test_what_a_dead_process_was_writing_is_swept(store: Store, child: Child) -> None:
    writer = child(WRITE, store.root)
    assert writer.stdout is not None
    writer.stdout.readline()
    Store(store.root)
    assert len(list((store.root / "tmp").iterdir())) == 1, "the writer lives"
    writer.kill()
    writer.wait()
    Store(store.root)
    assert list((store.root / "tmp").iterdir()) == []


def test_staging_is_left_alone_as_long_as_its_store_lives(store: Store) -> None:
    one, other = store.staging(KEY), store.staging(KEY)
    left = Store(store.root).staging(KEY)  # by an object that is gone
    assert len({one, other, left}) == 3
    Store(store.root)
    assert one.is_dir()
    assert other.is_dir()
    assert not left.exists()


def test_a_live_writer_whose_process_cannot_be_seen_is_left_alone(store: Store, child: Child) -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a process namespace can't be made here")
    writer = child(WRITE, store.root)
    assert writer.stdout is not None
    writer.stdout.readline()
    sweep = "import sys; from pathlib import Path; from optikit.store.store import Store; Store(Path(sys.argv[1]))"
    command = [*unshare, sys.executable, "-c", sweep, str(store.root)]
    for left in (1, 0):
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
        assert len(list((store.root / "tmp").iterdir())) == left
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("damage", ["directory", "link", "pipe"])
def test_a_damaged_lock_is_set_aside_and_told(store: Store, damage: str, tmp_path: Path) -> None:
    path, elsewhere = store.root / "locks" / f"{KEY}.lock", tmp_path / "elsewhere"
    {"directory": path.mkdir, "link": lambda: path.symlink_to(elsewhere), "pipe": lambda: os.mkfifo(path)}[damage]()
    with store.lock(KEY, timeout=0), pytest.raises(LockedError), Store(store.root).lock(KEY, timeout=0):
        pytest.fail("two hold one lock")
    assert "is no file" in store.warnings[0]
    assert not elsewhere.exists()
