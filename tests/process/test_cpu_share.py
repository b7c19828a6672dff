"""Shares of the processors: apart from each other, inherited, and free when their holder dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from optikit.process.cpu_share import share

HOLD = """
import os, sys
from optikit.process.cpu_share import share
with share(1) as mine:
    print(*mine, *os.sched_getaffinity(0), flush=True)
    sys.stdin.readline()
"""
needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor can't be shared out")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """Another process that has one processor."""
    command = [sys.executable, "-c", HOLD]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


@needs_two
def test_two_shares_are_apart_and_a_dead_ones_is_free(holder: subprocess.Popen[str]) -> None:
    before = os.sched_getaffinity(0)
    assert holder.stdout is not None
    theirs, only = holder.stdout.readline().split()
    assert theirs == only
    with share(1) as mine:
        assert str(mine[0]) != theirs
        assert os.sched_getaffinity(0) == set(mine)
        child = subprocess.check_output([sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"], text=True)
        assert child.split() == [str(mine[0])]
    assert os.sched_getaffinity(0) == before
    holder.kill()
    holder.wait()
    with share(1) as mine:
        assert mine == (min(before),)


@needs_two
def test_who_waits_too_long_takes_what_others_have() -> None:
    taken = sorted(os.sched_getaffinity(0))
    with share(1):
        started = time.monotonic()
        with share(len(taken), wait_s=0.3) as all_of_them:  # all that this process has now
            assert len(all_of_them) == 1
        assert time.monotonic() - started < 30


def test_all_of_them_need_no_share() -> None:
    before = os.sched_getaffinity(0)
    with share(None) as mine, share(1000) as more:
        assert set(mine) == set(more) == before == os.sched_getaffinity(0)
