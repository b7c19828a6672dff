"""Children of the speed test against real processes: stopped, dead, hung, noisy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optikit.errors import InputMissingError, OutOfMemoryError, StageFailedError, StageTimeoutError
from optikit.evaluation.speed_client import Arm
from tests.process.children import is_gone, wait_for

ECHO = "import sys,json\nfor line in sys.stdin: print(json.dumps({'ok': True, 'got': json.loads(line)}), flush=True)"


def arm(tmp_path, script=None, hang_s=30.0):
    command = None if script is None else [sys.executable, "-c", script]
    return Arm("result", log=tmp_path / "result.log", hang_s=hang_s, command=command)


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]


def test_an_arm_answers_and_is_stopped_between_questions(tmp_path):
    with arm(tmp_path, ECHO) as child:
        for number in range(2):
            assert child.ask("decode", prompt=[number]) == {"got": {"decode": {"prompt": [number]}}}
            assert wait_for(lambda: state(child.pid) == "T")
        pid = child.pid
    assert not Path(f"/proc/{pid}").exists()


def test_long_prompts_cross_the_pipe(tmp_path):
    with arm(tmp_path, ECHO) as child:
        prompt = list(range(100_000))
        assert child.ask("decode", prompt=prompt)["got"]["decode"]["prompt"] == prompt


def test_a_hung_arm_is_given_up(tmp_path):
    started = time.monotonic()
    with (
        arm(tmp_path, "import time; time.sleep(60)", hang_s=0.5) as child,
        pytest.raises(StageTimeoutError, match=r"result, asked to load: no answer in 0\.5 s"),
    ):
        child.ask("load")
    assert time.monotonic() - started < 10


def test_an_arm_that_dies_is_named_with_the_end_of_its_log(tmp_path):
    with arm(tmp_path, "import sys; sys.exit('the kernel is missing')") as child:
        with pytest.raises(StageFailedError, match="ended with exit code 1") as caught:
            child.ask("load")
        assert "the kernel is missing" in caught.value.message


def test_a_crash_is_named_by_its_signal(tmp_path):
    with (
        arm(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)") as child,
        pytest.raises(StageFailedError, match="SIGSEGV"),
    ):
        child.ask("load")


def test_a_killed_arm_means_memory(tmp_path):
    with arm(tmp_path, ECHO) as child:
        child.ask("decode")
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(OutOfMemoryError, match="killed by SIGKILL, most often for memory"):
            child.ask("decode")


def test_the_real_arm_reports_what_it_cannot_load(tmp_path):
    with arm(tmp_path, hang_s=120) as child, pytest.raises((InputMissingError, StageFailedError), match="result: "):
        child.ask("load", directory=str(tmp_path / "nothing"), runtime="transformers", dtype="float32", threads=1)


CONDUCTOR = """
import sys, time
from pathlib import Path
from optikit.evaluation.speed_client import Arm
with Arm("result", log=Path(sys.argv[1]), hang_s=60) as arm:
    arm.ask("peak")  # alive, and now stopped
    print(arm.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_an_arm_dies_with_its_conductor_even_while_it_is_stopped(tmp_path):
    command = [sys.executable, "-c", CONDUCTOR, str(tmp_path / "result.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as conductor:
        assert conductor.stdout is not None
        child = int(conductor.stdout.readline())
        assert wait_for(lambda: state(child) == "T")
        conductor.kill()
    assert wait_for(lambda: is_gone(child))
