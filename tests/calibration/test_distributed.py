"""One walk in two processes: the windows are shared, the sums agree, the result is that of one process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optikit import formats
from optikit.calibration import distributed
from optikit.errors import StageFailedError
from optikit.models.reader import read

SAMPLES, LENGTH = 6, 48
TOLERANCE = 0.05
"""Part by which two processes may lose more or less than one, as squared distance of weights. Sums are added up in
another order, so that a weight half-way between two codes falls to either side, and equal scales change places."""


def perform(verb: str, method: str, options: dict[str, Any], source: Path, prose: Path, place: Path, count: int):
    """Do a step as the runner does, in `count` processes; return its facts."""
    for name in ("job", "model", "scratch"):
        (place / name).mkdir(parents=True)
    request = {
        "verb": verb,
        "method": method,
        "backend": "optikit",
        "options": options,
        "source": str(source),
        "dest": str(place / "model"),
        "scratch": str(place / "scratch"),
        "inputs": {},
        "calibration": {"text": str(prose), "samples": SAMPLES, "length": LENGTH},
        "seed": 0,
        "device": "cpu",
        "threads": 1,
        "max_memory_bytes": None,
        "target": {"name": "cpu", "device": "cpu", "engines": ["onnxruntime", "vllm"]},
    }
    (place / "job" / "request.json").write_text(json.dumps(request))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "optikit.execution.worker", str(place / "job")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    response = json.loads((place / "job" / "response.json").read_text())
    assert response["ok"], response
    return response["facts"]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(sum((one[name] - other[name]).square().sum() for name in one))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    state = formats.load_state(directory, torch.float32)
    return {name: state[f"{name}.weight"] for name in read(directory).linears}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "method", "options"),
    [
        ("quantize", "gptq", {"group_size": 32}),
        ("quantize", "awq", {"group_size": 32, "steps": 4}),
        ("quantize", "int8", {"scheme": "w8a8"}),
        ("prune", "wanda", {}),
        ("prune", "sparsegpt", {"correct": False}),
    ],
)
def test_two_processes_do_what_one_does(verb, method, options, tiny_llama, prose, tmp_path):
    one = perform(verb, method, options, tiny_llama, prose, tmp_path / "one", 1)
    two = perform(verb, method, options, tiny_llama, prose, tmp_path / "two", 2)
    assert one.keys() == two.keys()
    dense = weights(tiny_llama)
    alone, shared = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    lost = [distance(each, dense) for each in (alone, shared)]
    assert abs(lost[0] - lost[1]) < TOLERANCE * lost[0]
    assert distance(alone, shared) < 0.5 * lost[0]  # far nearer to each other than to the dense weights
    mine, other = (tmp_path / "two" / part for part in ("model", "scratch/rank-1/dest"))
    files = [path.name for path in sorted(mine.iterdir())]
    assert [sha256(mine / name) for name in files] == [sha256(other / name) for name in files]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_process_shares_with_nobody():
    windows = torch.arange(6).reshape(3, 2)
    assert distributed.count() == 1
    assert torch.equal(distributed.share(windows), windows)
    assert distributed.agreed(3)


def test_more_processes_than_windows_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 4)
    with pytest.raises(StageFailedError, match="4 processes can't share 3"):
        distributed.share(torch.zeros(3, 2))
