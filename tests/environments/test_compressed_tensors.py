"""compressed-tensors itself: its classes parse our settings, and its compressors make the same floats, bit by bit.

Run: pytest -m "slow and network" tests/environments/test_compressed_tensors.py
`OPTIKIT_PEER_PYTHON` names a python that has the library; else the llm-compressor environment is built (minutes).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optikit import environments, formats, stages
from optikit.models.reader import read
from optikit.stage import Calibration, Job
from optikit.store.store import Store
from tests.conftest import build_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.network]
PACKED = {"format": "pack-quantized"}
DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8 dynamic": ("fp8", {"mse": True}),
    "fp8 dynamic, cache": ("fp8", {"kv_cache": True, "ignore": ["*.1.mlp.*"]}),
    "fp8 static": ("fp8", {"scheme": "static"}),
    "fp8 block": ("fp8", {"scheme": "block"}),
    "w4a16": ("gptq", {"group_size": 64, **PACKED}),
    "w4a16, asymmetric": ("awq", {"group_size": 32, "steps": 4, **PACKED}),
    "w4a16, channel, asymmetric": ("rtn", {"group_size": -1, "sym": False, **PACKED}),
    "w8a16": ("int8", {"group_size": 128, **PACKED}),
    "w8a16, channel": ("rtn", {"group_size": -1, "bits": 8, **PACKED}),
    "w8a16, asymmetric": ("int8", {"group_size": 32, "sym": False, **PACKED}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("model"), hidden=256, intermediate=384)


@pytest.mark.parametrize("name", DIALECTS)
def test_its_compressor_makes_the_same_weights(name: str, model: Path, prose: Path, tmp_path: Path) -> None:
    method, options = DIALECTS[name]
    stage = stages.load("quantize", method)
    places = {place: tmp_path / place for place in ("dest", "scratch")}
    for place in places.values():
        place.mkdir()
    chosen = stage.Options(**options)
    calibration = Calibration(text=prose, samples=4, length=64) if "calibration" in stage.inputs(chosen) else None
    stage.run(chosen, Job(source=model, calibration=calibration, **places))
    python = os.environ.get("OPTIKIT_PEER_PYTHON") or environments.ensure("llm-compressor", Store.default()).python
    script = Path(__file__).with_name("compressed_tensors_reads.py")
    command = [str(python), "-P", str(script), str(places["dest"]), str(tmp_path / "theirs.safetensors")]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-3000:]
    theirs, ours = load_file(tmp_path / "theirs.safetensors"), formats.load_state(places["dest"], torch.float32)
    packed = {f"{linear}.weight" for linear in read(model).linears if linear not in read(places["dest"]).left_dense}
    assert theirs.keys() == packed
    for weight in sorted(packed):
        assert torch.equal(theirs[weight], ours[weight]), weight
