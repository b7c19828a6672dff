"""Leases without the kernel's locks, as between machines: real processes, killed, stopped and let go on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from optikit.store import lease
from optikit.store.lease import Lease, LeaseLostError
from optikit.store.store import Store
from tests.store.artifacts import KEY
from tests.store.conftest import Child

QUICK = {"heartbeat_s": 0.05, "expiry_s": 1.0}

HOLD = """
import sys, time
from pathlib import Path
from optikit.store.lease import Lease, LeaseLostError
held = Lease(Path(sys.argv[1]), heartbeat_s=0.05, expiry_s=1.0)
while not held.take(alone_here=False):
    time.sleep(0.01)
print("held", flush=True)
sys.stdin.readline()
try:
    held.require()
    print("still held", flush=True)
except LeaseLostError:
    print("lost", flush=True)
held.give_back()
"""

COUNT = """
import sys, time
from pathlib import Path
from optikit.store.lease import Lease
place, log = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(20):
    held = Lease(place, heartbeat_s=0.5, expiry_s=60.0)
    while not held.take(alone_here=False):
        time.sleep(0.0005)
    before = int(log.read_text() or 0)
    time.sleep(0.001)
    log.write_text(str(before + 1))
    held.give_back()
"""

SAME_STEP = """
import sys, time
from pathlib import Path
from optikit.store.store import Manifest, Store
from tests.store.artifacts import KEY
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
with store.lock(KEY) as held:
    if store.find(KEY) is None:
        dest = store.staging(KEY)
        time.sleep(0.3)
        (dest / "weights").write_text("made")
        held.require()
        store.commit(KEY, dest, Manifest(key=KEY, verb="quantize", method="rtn"))
        print("made it", flush=True)
    else:
        print("found it", flush=True)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "a.lease"


def holder(child: Child, place: Path) -> subprocess.Popen[str]:
    process = child(HOLD, place)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def taken_after(place: Path, *, alone_here: bool = False) -> float:
    """Return seconds until this process got a lease, which it gives back."""
    mine, started = Lease(place, **QUICK), time.monotonic()
    while not mine.take(alone_here=alone_here):
        assert time.monotonic() - started < 30
        time.sleep(0.01)
    mine.require()
    mine.give_back()
    return time.monotonic() - started


def test_a_living_holder_keeps_it_beyond_the_time_after_which_a_silent_one_loses_it(child: Child, place: Path) -> None:
    process = holder(child, place)
    mine, started = Lease(place, **QUICK), time.monotonic()
    while time.monotonic() - started < 2.5 * QUICK["expiry_s"]:
        assert not mine.take(alone_here=False)
        time.sleep(0.02)
    assert f"process {process.pid} on {os.uname().nodename}" in mine.holder()
    let_go(process)
    assert line(process) == "still held\n"


def test_of_a_killed_holder_it_is_taken_when_it_was_silent_for_long_enough(child: Child, place: Path) -> None:
    process = holder(child, place)
    process.kill()
    process.wait()
    assert taken_after(place) >= QUICK["expiry_s"]


def test_whoever_has_the_kernels_lock_knows_at_once_that_the_holder_is_dead(child: Child, place: Path) -> None:
    process = holder(child, place)
    process.kill()
    process.wait()
    assert not Lease(place, **QUICK).take(alone_here=False)
    assert Lease(place, **QUICK).take(alone_here=True)


def test_a_holder_that_was_stopped_finds_out_that_others_took_over(child: Child, place: Path) -> None:
    process = holder(child, place)
    process.send_signal(signal.SIGSTOP)
    mine = Lease(place, **QUICK)
    while not mine.take(alone_here=False):
        time.sleep(0.01)
    process.send_signal(signal.SIGCONT)
    let_go(process)
    assert line(process) == "lost\n"
    process.wait()
    mine.require()  # what the late one did when it went on took nothing away
    assert not Lease(place, **QUICK).take(alone_here=False)
    mine.give_back()
    assert Lease(place, **QUICK).take(alone_here=False)


def test_a_holder_that_cannot_say_that_it_lives_stops_before_others_take_over(place: Path) -> None:
    mine = Lease(place, heartbeat_s=0.05, expiry_s=1.0)
    assert mine.take(alone_here=False)
    place.rename(place.with_name("gone"))  # as when the server is
    mine.require()
    time.sleep(0.85)
    with pytest.raises(LeaseLostError):
        mine.require()


def test_many_processes_never_hold_it_at_once(child: Child, place: Path, tmp_path: Path) -> None:
    log = tmp_path / "count"
    log.write_text("")
    processes = [child(COUNT, place, log) for _ in range(4)]
    for process in processes:
        assert process.wait(60) == 0
    assert log.read_text() == "80"
    assert len(list(place.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_what_nobody_can_read_counts_as_held_until_it_was_silent_for_long_enough(place: Path, content: bytes) -> None:
    place.mkdir()
    (place / "7").write_bytes(content)
    assert not Lease(place, **QUICK).take(alone_here=True)
    assert taken_after(place, alone_here=True) >= QUICK["expiry_s"]
    assert [path.name for path in place.iterdir()] == ["8"]


@pytest.mark.parametrize("fault", ["", "lock:nolock"])
def test_one_of_several_processes_makes_an_artifact_and_the_others_find_it(
    child: Child, tmp_path: Path, fault: str
) -> None:
    """Through two views of one folder, with the kernel's locks and on a file system that has none."""
    (tmp_path / "store").mkdir(mode=0o700)
    views = [tmp_path / "node-a", tmp_path / "node-b"]
    for view in views:
        view.symlink_to(tmp_path / "store")
    environment = {"OPTIKIT_TESTING": "1", "OPTIKIT_FAULT": fault} if fault else {}
    processes = [child(SAME_STEP, view, **environment) for view in (*views, *views)]
    for process in processes:
        assert line(process) == "ready\n"
    for process in processes:
        let_go(process)
    told = [line(process) for process in processes]
    assert sorted(told) == ["found it\n", "found it\n", "found it\n", "made it\n"]


def test_looking_takes_nothing(store: Store, child: Child) -> None:
    path = store.root / "locks" / f"{KEY}.lease"
    assert not store.is_locked(KEY)
    assert not path.exists()
    process = holder(child, path)
    assert lease.is_held(path, alone_here=False)
    let_go(process)
    assert process.wait(10) == 0
    assert not store.is_locked(KEY)
    with store.lock(KEY):
        assert store.is_locked(KEY)
    assert not store.is_locked(KEY)
    assert {each.name for each in path.iterdir()} == {"2"}
