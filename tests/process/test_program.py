"""Programs run to their end: what they say, where their log is, what their death is called."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from optikit.errors import DiskError, OutOfMemoryError, StageFailedError
from optikit.process import launch, program
from optikit.stage import Job


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_short_command_answers() -> None:
    done = program.run(python("import sys; print('out'); sys.stderr.write('err'); sys.exit(3)"))
    assert done == program.Done(3, "out\n", "err")


def test_where_and_with_what_it_runs(tmp_path: Path) -> None:
    show = python("import os; print(os.getcwd(), os.environ['HERE'])")
    done = program.run(show, directory=tmp_path, environ={"HERE": "yes"})
    assert done.output.split() == [str(tmp_path.resolve()), "yes"]


def test_one_that_is_not_there_and_one_that_hangs() -> None:
    assert program.run(["/nowhere/tool"]).code == launch.CANNOT_START
    with pytest.raises(TimeoutError, match=r"longer than 0\.3 s"):
        program.run(python("import time; time.sleep(600)"), seconds=0.3)


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (
            "raise ValueError('unknown family')",
            StageFailedError,
            "exit code 1; .*\nValueError: unknown family",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", StageFailedError, "crashed with SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", OutOfMemoryError, "SIGKILL"),
        ("bytearray(2**60)", OutOfMemoryError, "MemoryError"),
        ("open('/dev/full', 'w').write('x' * 10**6)", DiskError, "No space left on device"),
        ("import sys; sys.exit('cc1plus: out of memory allocating 65536 bytes')", OutOfMemoryError, "cc1plus"),
    ],
)
def test_how_it_failed_has_a_name(tmp_path: Path, code: str, error: type[Exception], said: str) -> None:
    log = tmp_path / "log"
    with pytest.raises(error, match=f"(?s)^the tool: its process .*{said}") as caught:
        program.perform("the tool", python(code), log=log)
    assert caught.value.fix
    assert error is StageFailedError or "Traceback" not in caught.value.message


def test_a_log_is_of_one_run(tmp_path: Path) -> None:
    for number in range(2):
        program.perform("it", python(f"print({number})"), log=tmp_path / "log")
    assert (tmp_path / "log").read_text() == "1\n"


class TestTrial:
    @pytest.fixture
    def job(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Job(source=tmp_path, dest=tmp_path, scratch=tmp_path / "scratch", threads=3)

    def test_it_is_given_the_directory_and_answers_in_one_line(self, job: Job, tmp_path: Path) -> None:
        (tmp_path / "tries.py").write_text(
            "import json, os, sys\nprint('noise')\nsys.stderr.write('more')\n"
            "names = ('OMP_NUM_THREADS', 'HF_HUB_OFFLINE', 'HF_HOME')\n"
            "print(json.dumps([sys.argv[1:], *(os.environ[name] for name in names)]))\n"
        )
        answer = json.loads(program.trial("trying", "tries", job, "8"))
        assert answer == [[str(tmp_path.resolve()), "8"], "3", "1", str(job.scratch / "hf")]
        assert (job.scratch / "trial.log").read_text() == "more"

    def test_it_sees_no_git_repository(self, job: Job, tmp_path: Path) -> None:
        assert program.run(["git", "init", "--quiet", str(tmp_path)]).code == 0
        shown = ["git", "rev-parse", "--git-dir"]
        assert program.run(shown, directory=tmp_path).code == 0
        assert program.run(shown, directory=tmp_path, environ=program.environment(job)).code != 0

    def test_a_crash(self, job: Job, tmp_path: Path) -> None:
        (tmp_path / "tries.py").write_text(
            "import os, sys\nsys.stderr.write('last words')\nsys.stderr.flush()\n"
            f"os.kill(os.getpid(), {signal.SIGILL:d})"
        )
        with pytest.raises(
            StageFailedError, match="trying: its process crashed with SIGILL; its log ends:\nlast words"
        ):
            program.trial("trying", "tries", job)
