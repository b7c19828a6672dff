"""A step's process from the runner's side: real workers that answer, hang, crash, and find no room."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from optikit.errors import DiskError, Exit, OutOfMemoryError, StageFailedError, StageTimeoutError
from optikit.execution import supervise
from tests.execution.test_worker import FILL
from tests.execution.toys import write_job
from tests.process.children import SLEEPS, is_gone, small_disk, wait_for, written_pid


@pytest.fixture(autouse=True)
def _beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def respond(directory: Path, *, timeout: float | None = None, seen: list[tuple[int, int, str]] | None = None):
    return supervise.respond("1-toy", directory, timeout=timeout, observe=lambda *each: (seen or []).append(each))


def test_the_answer_the_events_and_the_log(tmp_path: Path) -> None:
    reports = "for n in range(3): job.progress(n + 1, 3, 'block'); time.sleep(0.2)"
    body = f"import time; print('noise')\n    {reports}\n    return {{}}"
    directory, seen = write_job(tmp_path, body), [(0, 0, "start")]
    assert respond(directory, seen=seen)["ok"]
    assert seen == [(0, 0, "start"), (1, 3, "block"), (2, 3, "block"), (3, 3, "block")]
    assert (directory / "log.txt").read_text() == "noise\n"


def test_what_the_worker_sees_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "DATABASE_URL", "DB_PASS", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "canary")
    response = respond(write_job(tmp_path, "import os; return dict(os.environ)"))
    seen = response["facts"]
    assert "canary" not in seen.values()
    assert {name: seen.get(name) for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONHASHSEED")} == {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }


def test_an_error_of_the_stage_is_an_answer(tmp_path: Path) -> None:
    response = respond(write_job(tmp_path, "raise ValueError('odd')"))
    assert (response["ok"], response["code"], response["message"]) == (False, Exit.STAGE_FAILED, "ValueError: odd")


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", StageFailedError, "crashed with SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", OutOfMemoryError, "was killed"),
        ("import os; os._exit(3)", StageFailedError, "ended with exit code 3"),
        ("import os; os.write(2, b'MemoryError'); os._exit(1)", OutOfMemoryError, "MemoryError"),
    ],
)
def test_a_death_has_a_name(tmp_path: Path, body: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"(?s)^1-toy: its process .*{said}"):
        respond(write_job(tmp_path, body))


def test_a_full_disk_that_leaves_no_room_for_the_answer(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        directory = write_job(tmp_path, FILL.format(fails=False), directory=disk / "job")
        with pytest.raises(DiskError, match=r"^1-toy: "):
            respond(directory)


def test_a_hang_ends_at_the_time_limit_with_what_it_started(tmp_path: Path) -> None:
    sleeps = SLEEPS.format(path=str(tmp_path / "pid"))
    body = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeps!r}], start_new_session=True)"
    with pytest.raises(StageTimeoutError, match="1-toy: took longer than 6 s") as caught:
        respond(write_job(tmp_path, body), timeout=6)
    assert "timeout:" in caught.value.fix
    assert wait_for(lambda: is_gone(written_pid(tmp_path / "pid")))


RUNNER = """
import sys
from pathlib import Path
from optikit.execution import supervise
supervise.respond("toy", Path(sys.argv[1]), timeout=None, observe=lambda *_: None)
"""
WRITES_PID = """import os, pathlib, time
    pathlib.Path({path!r} + os.environ.get('RANK', '')).write_text(str(os.getpid()))
    time.sleep(600)"""


def test_a_worker_dies_with_its_runner(tmp_path: Path) -> None:
    directory = write_job(tmp_path, WRITES_PID.format(path=str(tmp_path / "pid")))
    with subprocess.Popen([sys.executable, "-c", RUNNER, str(directory)]) as runner:
        pid = written_pid(tmp_path / "pid")
        runner.kill()
    assert wait_for(lambda: is_gone(pid))


def test_so_do_several_that_share_a_step(tmp_path: Path) -> None:
    """torchrun puts each in a session of its own, and passes nothing on when it is killed itself."""
    body = WRITES_PID.format(path=str(tmp_path / "pid"))
    with subprocess.Popen([sys.executable, "-c", RUNNER, str(write_job(tmp_path, body, ranks=2))]) as runner:
        pids = [written_pid(tmp_path / f"pid{rank}") for rank in range(2)]
        runner.kill()
    assert all(wait_for(lambda pid=pid: is_gone(pid)) for pid in pids)


def test_what_is_answered_is_json_of_the_first_rank_alone(tmp_path: Path) -> None:
    body = "import os; return {'rank': os.environ['RANK'], 'dest': job.dest.name}"
    directory = write_job(tmp_path, body, ranks=2)
    assert respond(directory)["facts"] == {"rank": "0", "dest": "dest"}
    assert json.loads((directory / "response.json").read_text())["ok"]
