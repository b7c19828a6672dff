"""A server that is kept no longer than needed: real processes that answer, die, hang, and start others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optikit.errors import OutOfMemoryError, StageFailedError, StageTimeoutError
from optikit.process import server
from optikit.runtime import vllm_server

SERVER = """
import http.server, os, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/metrics": self.wfile.write(open("metrics").read().encode())
    def log_message(self, *_): pass
{first}
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
GRANDCHILD = "import time; time.sleep(600)"
STARTS_ANOTHER = (
    f"other = subprocess.Popen([sys.executable, '-c', {GRANDCHILD!r}])\nopen('other', 'w').write(str(other.pid))"
)
METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="model"} 40.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="model"} 120.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="model"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="model",position="0"} 20.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="model",position="1"} 1e+01
vllm:spec_decode_num_drafts_created{engine="0",model_name="model"} 1.7e+09
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a server that runs some code first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").write_text(METRICS)

    def begin(first: str = "", start_s: float = 60):
        (tmp_path / "server.py").write_text(SERVER.format(first=first))
        port = vllm_server.free_port()
        command = [sys.executable, str(tmp_path / "server.py"), str(port)]
        return port, vllm_server.kept(command, os.environ, port=port, log=tmp_path / "log", start_s=start_s)

    return begin


def gone(pid: int) -> bool:
    """Wait for a process to end; one that nobody waited for yet counts as gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_it_answers_and_ends_with_all_that_it_started(start, tmp_path):
    port, kept = start(STARTS_ANOTHER)
    with kept as group:
        assert vllm_server.drafting(f"http://127.0.0.1:{port}")["drafts"] == 40
        other = int((tmp_path / "other").read_text())
        assert os.getpgid(other) == group != os.getpgid(0)
    assert gone(other)
    assert gone(group)


@pytest.mark.parametrize(
    ("first", "error", "said"),
    [
        ("raise ValueError('no such architecture')", StageFailedError, "exit code 1; .*\n.*no such architecture"),
        ("os.kill(os.getpid(), 11)", StageFailedError, "exit code 139"),
        ("os.kill(os.getpid(), 9)", OutOfMemoryError, "was killed"),
        ("import time; print('loading', flush=True); time.sleep(600)", StageTimeoutError, "1 s after .*\nloading"),
        ("[print('x' * 1000) for _ in range(20000)]; raise ValueError('after 20 MB')", StageFailedError, "after 20 MB"),
    ],
)
def test_one_that_does_not_come_up_is_told_by_its_log(start, first, error, said):
    timeout = 1 if error is StageTimeoutError else 60
    with pytest.raises(error, match=said) as caught, start(first, timeout)[1]:
        pass
    assert caught.value.fix
    assert len(caught.value.message) < 10_000


def test_one_that_crashes_takes_its_children_along(start, tmp_path):
    with pytest.raises(StageFailedError), start(STARTS_ANOTHER + "\nsys.exit(3)")[1]:
        pass
    assert gone(int((tmp_path / "other").read_text()))


def test_it_ends_when_its_starter_is_killed(tmp_path):
    """Nothing can clean up after SIGKILL; the closed pipe tells the keeper."""
    script = f"import subprocess, sys, time\n{STARTS_ANOTHER}\ntime.sleep(600)"
    starter = (
        "import subprocess, sys, time\n"
        f"kept = subprocess.Popen([sys.executable, {server.__file__!r}, sys.executable, '-c', {script!r}],"
        " stdin=subprocess.PIPE, start_new_session=True)\ntime.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", starter], cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "other").is_file() or not (tmp_path / "other").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    other = int((tmp_path / "other").read_text())
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert gone(other)


def test_acceptance_is_read_from_the_metrics():
    assert vllm_server.counted(METRICS) == {
        "drafts": 40,
        "drafted_tokens": 120,
        "accepted_tokens": 30,
        "acceptance_length": 1.75,
        "acceptance_by_position": [0.5, 0.25],
    }
    assert vllm_server.counted("vllm:num_requests_running 0.0\n") == {}


def test_the_cache_holds_what_is_asked_for(tiny_llama):
    from optikit.models.reader import read

    facts = read(tiny_llama)  # 2 layers, 2 key and value heads of 16, keys and values of 2 bytes
    assert vllm_server.cache_gib(facts, 1) == 1
    assert vllm_server.cache_gib(facts, 3 * 2**30 // 256) == 3
    assert vllm_server.cache_gib(facts, 3 * 2**30 // 256 + 1) == 4
