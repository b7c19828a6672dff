"""A server that is kept no longer than it is wanted: real processes that answer, die, hang, and start others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from optikit.errors import OutOfMemoryError, StageFailedError, StageTimeoutError
from optikit.process import server
from tests.process.children import SLEEPS, is_gone, wait_for, written_pid

READY = "import pathlib, time; print('up', flush=True); pathlib.Path('ready').touch(); time.sleep(600)"


def running(tmp_path: Path, code: str, start_s: float = 60):
    command = [sys.executable, "-c", code]
    ready = (tmp_path / "ready").exists
    return server.running(
        "it", command, environ=os.environ, log=tmp_path / "log", answers=ready, start_s=start_s, directory=tmp_path
    )


def starts_another(tmp_path: Path) -> str:
    path = str(tmp_path / "pid")
    return (
        f"import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {SLEEPS.format(path=path)!r}])\n"
        f"while not os.path.exists({path!r}) or not os.path.getsize({path!r}): time.sleep(0.01)\n"
    )


def test_the_block_begins_when_it_answers_and_all_of_it_ends_with_the_block(tmp_path: Path) -> None:
    with running(tmp_path, starts_another(tmp_path) + READY) as child:
        assert (tmp_path / "ready").exists()
        other = written_pid(tmp_path / "pid")
        assert os.getpgid(other) == child.pid != os.getpgid(0)
    assert wait_for(lambda: is_gone(other))
    assert is_gone(child.pid)


def test_it_may_take_its_leave(tmp_path: Path) -> None:
    polite = (
        "import signal, sys\n"
        "def leave(*_):\n    print('saved', flush=True)\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
    )
    with running(tmp_path, polite + READY):
        pass
    assert (tmp_path / "log").read_text() == "up\nsaved\n"


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("raise ValueError('no such architecture')", StageFailedError, "exit code 1; .*\n.*no such architecture"),
        ("import os; os.kill(os.getpid(), 11)", StageFailedError, "crashed with SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", OutOfMemoryError, "was killed"),
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')", OutOfMemoryError, "2.00 GiB"),
        ("import time; print('loading', flush=True); time.sleep(600)", StageTimeoutError, "in 1 s; .*\nloading"),
        ("[print('x' * 1000) for _ in range(20000)]; raise ValueError('after 20 MB')", StageFailedError, "after 20 MB"),
    ],
)
def test_one_that_does_not_come_up_is_told_by_its_log(tmp_path: Path, code, error, said) -> None:
    timeout = 1 if error is StageTimeoutError else 60
    with pytest.raises(error, match=f"(?s)^it: .*{said}") as caught, running(tmp_path, code, timeout):
        pass
    assert caught.value.fix
    assert len(caught.value.message) < 10_000


def test_one_that_crashes_takes_its_children_along(tmp_path: Path) -> None:
    code = starts_another(tmp_path) + "sys.exit(3)"
    with pytest.raises(StageFailedError, match="exit code 3"), running(tmp_path, code):
        pass
    assert wait_for(lambda: is_gone(written_pid(tmp_path / "pid")))
