"""vLLM's part of a server, on a real process that answers like it: its address, its group, its counters, its death."""

from __future__ import annotations

import os
import sys

import pytest

from optikit.errors import StageFailedError
from optikit.runtime import vllm_server
from tests.process.children import is_gone, wait_for

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


def test_it_answers_and_ends_with_all_that_it_started(start, tmp_path):
    port, kept = start(STARTS_ANOTHER)
    with kept as group:
        assert vllm_server.drafting(f"http://127.0.0.1:{port}")["drafts"] == 40
        other = int((tmp_path / "other").read_text())
        assert os.getpgid(other) == group != os.getpgid(0)
    assert wait_for(lambda: is_gone(other))
    assert is_gone(group)


def test_one_that_does_not_come_up_is_called_by_its_name(start):
    with pytest.raises(StageFailedError, match=r"(?s)^vLLM: its process ended with exit code 1; .*no such family"):
        start("raise ValueError('no such family')")[1].__enter__()


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
