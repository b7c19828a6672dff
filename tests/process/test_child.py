"""Real children: started, watched, stopped with all that they started, and gone when their parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.errors import OutOfMemoryError, StageFailedError, StageTimeoutError
from optikit.process import child, launch
from tests.process.children import SLEEPS, WRITE_PID, is_gone, wait_for, written_pid

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def nothing() -> None:
    """Do nothing between looks."""


def test_it_has_a_session_of_its_own_and_is_the_command_itself(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with child.started(python("import os; print(os.getpid(), os.getsid(0), os.getppid())"), log=log) as it:
        assert it.watch("it", between=nothing) == 0
        assert log.read_text().split() == [str(it.pid), str(it.pid), str(os.getpid())]


def test_its_environment_has_no_credential_and_what_is_given_counts(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    show = python("import os; print(os.environ.get('HF_TOKEN'), os.environ.get('RANK'), 'PATH' in os.environ)")
    monkeypatch.setenv("RANK", "3")
    for environ, said in ((None, "None None True"), (dict(os.environ), "canary 3 True")):
        with child.started(show, environ=environ, piped=True) as it:
            assert it.finish()[0].strip() == said


@pytest.mark.parametrize("kept", [False, True])
def test_a_command_that_is_not_there(tmp_path: Path, kept: bool) -> None:
    with child.started(["/nowhere/tool"], log=tmp_path / "log", kept=kept) as it:
        assert it.watch("it", between=nothing) == launch.CANNOT_START
        with pytest.raises(StageFailedError, match="/nowhere/tool can't be started: No such file"):
            raise it.death("it")


STARTER = """
import sys, time
from pathlib import Path
from optikit.process import child
with child.started([sys.executable, "-c", sys.argv[1]], log=Path(sys.argv[2]), kept=sys.argv[3] == "kept"):
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["tied", "kept"])
def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path, how: str) -> None:
    command = [*python(STARTER), SLEEPS.format(path=str(tmp_path / "pid")), str(tmp_path / "log"), how]
    with subprocess.Popen(command) as starter:
        pid = written_pid(tmp_path / "pid")
        starter.kill()
    assert wait_for(lambda: is_gone(pid))


def test_a_stopped_one_dies_with_its_parent_too(tmp_path: Path) -> None:
    command = [*python(STARTER), SLEEPS.format(path=str(tmp_path / "pid")), str(tmp_path / "log"), "tied"]
    with subprocess.Popen(command) as starter:
        pid = written_pid(tmp_path / "pid")
        os.kill(pid, signal.SIGSTOP)
        starter.kill()
    assert wait_for(lambda: is_gone(pid))


def test_what_a_kept_one_started_dies_with_the_parent(tmp_path: Path) -> None:
    starts = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SLEEPS.format(path=str(tmp_path / 'pid'))!r}])"
    )
    with subprocess.Popen([*python(STARTER), starts, str(tmp_path / "log"), "kept"]) as starter:
        pid = written_pid(tmp_path / "pid")
        starter.kill()
    assert wait_for(lambda: is_gone(pid))


def test_one_whose_parent_died_before_it_was_tied_never_begins(tmp_path: Path) -> None:
    """The parent ends between the fork and the tie: the launcher waits on a pipe until that has happened."""
    touch = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"]
    late = (
        "import os, pathlib, runpy, sys, time\n"
        "parent = int(sys.argv[1])\n"
        "while os.getppid() == parent: time.sleep(0.01)\n"
        f"sys.argv = ['launch', 'tied', str(parent), *{touch!r}]\n"
        f"try: runpy.run_path({launch.__file__!r}, run_name='__main__')\n"
        f"finally: pathlib.Path({str(tmp_path / 'survived')!r}).touch()\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"it = subprocess.Popen([sys.executable, '-c', {late!r}, str(os.getpid())], start_new_session=True)\n"
        "print(it.pid)\n"
    )
    said = subprocess.run(python(parent), capture_output=True, text=True, check=True)
    assert wait_for(lambda: is_gone(int(said.stdout)))
    assert list(tmp_path.iterdir()) == []


def test_what_a_tied_command_starts_as_its_equal_ties_itself(tmp_path: Path) -> None:
    """torchrun starts its processes in sessions of their own."""
    equal = "from optikit.process import launch; launch.end_with_launched()\n" + SLEEPS.format(
        path=str(tmp_path / "pid")
    )
    starts = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {equal!r}], start_new_session=True).wait()"
    )
    with child.started(python(starts), log=tmp_path / "log") as it:
        pid = written_pid(tmp_path / "pid")
        it.signal(signal.SIGKILL)
        assert wait_for(lambda: is_gone(pid))


class TestStop:
    def test_politely(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        code = (
            "import signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: (print('bye'), sys.exit(0)))\n"
            "print('ready', flush=True); time.sleep(600)"
        )
        with child.started(python(code), log=log) as it:
            assert wait_for(lambda: "ready" in log.read_text())
        assert log.read_text() == "ready\nbye\n"
        assert it.code == 0

    def test_one_that_does_not_want_to(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        code = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
        )
        with child.started(python(code), log=log, grace_s=0.3) as it:
            assert wait_for(log.read_text)
        assert it.code == -signal.SIGKILL

    def test_one_that_is_stopped(self, tmp_path: Path) -> None:
        with child.started(python("import time; time.sleep(600)"), log=tmp_path / "log") as it:
            it.signal(signal.SIGSTOP)
        assert it.code == -signal.SIGTERM

    @pytest.mark.parametrize("session", [False, True])
    def test_what_it_started_goes_too(self, tmp_path: Path, session: bool) -> None:
        stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPS.format(
            path=str(tmp_path / "pid")
        )
        more = f"start_new_session={session}"
        code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}], {more}).wait()"
        with child.started(python(code), log=tmp_path / "log", grace_s=0.3):
            pid = written_pid(tmp_path / "pid")
        assert wait_for(lambda: is_gone(pid))

    def test_what_outlived_it_goes_too(self, tmp_path: Path) -> None:
        path = str(tmp_path / "pid")
        code = (
            "import os, subprocess, sys, time\n"
            f"subprocess.Popen([sys.executable, '-c', {SLEEPS.format(path=path)!r}])\n"
            f"while not os.path.exists({path!r}) or not os.path.getsize({path!r}): time.sleep(0.01)\n"
        )
        with child.started(python(code), log=tmp_path / "log") as it:
            assert it.watch("it", between=nothing) == 0
            pid = written_pid(tmp_path / "pid")
            assert not is_gone(pid)
        assert wait_for(lambda: is_gone(pid))

    def test_an_error_in_the_block_ends_it(self, tmp_path: Path) -> None:
        def fail() -> None:
            with child.started(python(SLEEPS.format(path=str(tmp_path / "pid"))), log=tmp_path / "log"):
                raise KeyError(written_pid(tmp_path / "pid"))

        with pytest.raises(KeyError):
            fail()
        assert wait_for(lambda: is_gone(written_pid(tmp_path / "pid")))


class TestWatch:
    def test_a_time_limit(self, tmp_path: Path) -> None:
        started = time.monotonic()
        with child.started(python("import time; time.sleep(600)"), log=tmp_path / "log") as it:
            with pytest.raises(StageTimeoutError, match=r"^it: took longer than 0\.3 s$") as caught:
                it.watch("it", seconds=0.3, between=nothing, fix="wait")
            assert it.code is None
        assert caught.value.fix == "wait"
        assert time.monotonic() - started < 60

    def test_what_is_written_last_is_still_seen(self, tmp_path: Path) -> None:
        lines, seen = child.NewLines(tmp_path / "log"), []
        with child.started(python("for n in range(5000): print(n)"), log=tmp_path / "log") as it:
            it.watch("it", between=lambda: seen.extend(lines.read()))
        assert seen == [str(number) for number in range(5000)]

    @pytest.mark.parametrize("how", ["watched", "finished", "kept"])
    def test_a_log_that_would_fill_the_disk_is_begun_anew(self, tmp_path: Path, monkeypatch, how: str) -> None:
        monkeypatch.setattr(child, "MOST_LOG_BYTES", 2**20)
        log = tmp_path / "log"
        code = "import os, time\nfor _ in range(80): os.write(2, b'x' * 2**18); time.sleep(0.02)\ntime.sleep(1.5)"
        with child.started(python(code), log=log, piped=how == "finished", kept=how == "kept") as it:
            if how == "watched":
                it.watch("it", between=nothing)
            elif how == "finished":
                it.finish()
            else:
                assert wait_for(lambda: it.code is not None)
        assert log.stat().st_size < 15 * 2**20
        assert b"were cut off" in log.read_bytes()  # what is written meanwhile may stand before it


class TestFinish:
    def test_both_pipes(self) -> None:
        with child.started(python("import sys; print('out'); sys.stderr.write('err')"), piped=True) as it:
            assert it.finish() == ("out\n", "err")

    def test_much_is_read_without_a_deadlock(self) -> None:
        with child.started(python("print('x' * 10_000_000)"), piped=True) as it:
            assert len(it.finish()[0]) == 10_000_001

    def test_too_late(self) -> None:
        with child.started(python("import time; time.sleep(600)"), piped=True) as it:
            with pytest.raises(TimeoutError, match=r"took longer than 0\.2 s"):
                it.finish(0.2)
            pid = it.pid
        assert is_gone(pid)


def test_a_keeper_tells_the_signal_that_ended_its_command(tmp_path: Path) -> None:
    for number, error in ((signal.SIGKILL, OutOfMemoryError), (signal.SIGSEGV, StageFailedError)):
        code = f"import os; os.kill(os.getpid(), {int(number)})"
        with child.started(python(code), log=tmp_path / "log", kept=True) as it:
            it.watch("it", between=nothing)
            assert it.code == 128 + number
            with pytest.raises(error, match=number.name):
                raise it.death("it")


def test_pipes_and_logs_are_asked_for_only_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a log or pipes"), child.started(["true"]):
        pass
    with child.started(["true"], log=tmp_path / "log") as it, pytest.raises(ValueError, match="without pipes"):
        it.input.close()
    with child.started(["true"], piped=True) as it, pytest.raises(ValueError, match="with a log"):
        it.death("it")


def test_who_is_alive(tmp_path: Path) -> None:
    with child.started(python(WRITE_PID.format(path=str(tmp_path / "pid"))), log=tmp_path / "log") as it:
        it.watch("it", between=nothing)
    assert not child.is_alive(it.pid)
    assert child.is_alive(os.getpid())
    assert child.is_alive(1)
    assert child.is_alive(2**70)  # no such id can be asked about: whoever wrote it isn't ours to judge


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"))),
    st.data(),
)
def test_lines_come_once_and_whole_however_they_are_written(tmp_path_factory, lines: list[str], data) -> None:
    path = tmp_path_factory.mktemp("lines") / "log"
    written = "".join(f"{line}\n" for line in lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=5)))
    reader, seen = child.NewLines(path), []
    assert reader.read() == []
    for start, end in zip([0, *cuts], [*cuts, len(written)], strict=True):
        with path.open("ab") as file:
            file.write(written[start:end])
        seen += reader.read()
    assert seen == lines


def test_lines_of_a_file_that_was_begun_anew(tmp_path: Path) -> None:
    (path := tmp_path / "log").write_text("one\ntwo\n")
    reader = child.NewLines(path)
    assert reader.read() == ["one", "two"]
    path.write_text("3\n")
    assert reader.read() == []  # shorter than what was read: its end is where reading goes on
    with path.open("a") as file:
        file.write("four\n")
    assert reader.read() == ["four"]
