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
from safetensors.torch import load_file, save_file

from optikit import environments, formats, stages
from optikit.algorithms import fp8
from optikit.models.reader import read
from optikit.stage import Calibration, Job
from optikit.store.store import Store
from tests.conftest import build_tiny_llama
from tests.stages.test_mixtures import save

pytestmark = [pytest.mark.slow, pytest.mark.network]
PACKED = {"format": "pack-quantized"}
DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8 dynamic": ("fp8", {"mse": True}),
    "fp8 dynamic, spanning": ("fp8", {}),
    "w8a8": ("int8", {"scheme": "w8a8"}),
    "fp8 dynamic, cache": ("fp8", {"kv_cache": True, "ignore": ["*.1.mlp.*"]}),
    "fp8 static": ("fp8", {"scheme": "static"}),
    "fp8 block": ("fp8", {"scheme": "block"}),
    "nvfp4": ("fp4", {}),
    "nvfp4, spanning": ("fp4", {"mse": False}),
    "mxfp4": ("fp4", {"scheme": "mxfp4"}),
    "mxfp4, spanning": ("fp4", {"scheme": "mxfp4", "mse": False}),
    "w4a16": ("gptq", {"group_size": 64, **PACKED}),
    "w4a16, asymmetric": ("awq", {"group_size": 32, "steps": 4, **PACKED}),
    "w4a16, channel, asymmetric": ("rtn", {"group_size": -1, "sym": False, **PACKED}),
    "w8a16": ("int8", {"group_size": 128, **PACKED}),
    "w8a16, channel": ("rtn", {"group_size": -1, "bits": 8, **PACKED}),
    "w8a16, asymmetric": ("int8", {"group_size": 32, "sym": False, **PACKED}),
}


MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts, fp8 dynamic": ("fp8", {}),
    "experts, fp8 static": ("fp8", {"scheme": "static"}),
    "experts, nvfp4": ("fp4", {}),
    "experts, w4a16": ("gptq", {"group_size": 32, **PACKED}),
    "experts, w8a8": ("int8", {"scheme": "w8a8"}),
}
"""Of Mixtral: a linear of each expert, by the names that vLLM gives them."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> dict[str, tuple[Path, Path]]:
    """Source and result of each dialect, by name; beside a result what the library makes of it: all in one process."""
    work = tmp_path_factory.mktemp("dialects")
    dense = build_tiny_llama(work / "llama", hidden=256, intermediate=384)
    experts = save("mixtral", work / "mixtral")
    found = {}
    for number, (name, (method, options)) in enumerate((DIALECTS | MIXTURES).items()):
        source = experts if name in MIXTURES else dense
        stage = stages.load("quantize", method)
        dest, scratch = work / f"{number}", work / f"scratch{number}"
        dest.mkdir()
        scratch.mkdir()
        chosen = stage.Options(**options)
        text = Calibration(text=prose, samples=4, length=64) if "calibration" in stage.inputs(chosen) else None
        stage.run(chosen, Job(source=source, dest=dest, scratch=scratch, calibration=text))
        found[name] = source, dest
    python = os.environ.get("OPTIKIT_PEER_PYTHON") or environments.ensure("llm-compressor", Store.default()).python
    script = Path(__file__).with_name("compressed_tensors_reads.py")
    torch.manual_seed(0)
    save_file({"inputs": torch.randn(64, 256) * torch.logspace(-3, 2, 64)[:, None]}, work / "inputs.safetensors")
    rounded = [str(work / name) for name in ("inputs.safetensors", "rounded.safetensors")]
    command = [str(python), "-P", str(script), *rounded, *(str(path) for both in found.values() for path in both)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-3000:]
    return found


@pytest.mark.parametrize("name", [*DIALECTS, *MIXTURES])
def test_its_compressor_makes_the_same_weights(name: str, places: dict[str, tuple[Path, Path]]) -> None:
    source, dest = places[name]
    theirs, ours = load_file(f"{dest}.safetensors"), formats.load_state(dest, torch.float32)
    packed = {f"{linear}.weight" for linear in read(source).linears if linear not in read(dest).left_dense}
    assert theirs.keys() == packed
    for weight in sorted(packed):
        # Its decompressor returns FP4 in bfloat16, whatever it is asked for.
        mine = ours[weight] if theirs[weight].dtype == torch.float32 else ours[weight].bfloat16()
        assert torch.equal(theirs[weight], mine), weight


@pytest.mark.parametrize("name", [name for name in (*DIALECTS, *MIXTURES) if "fp4" in name or "dynamic" in name])
def test_its_compressor_packs_the_same_bytes(name: str, places: dict[str, tuple[Path, Path]]) -> None:
    """Codes on our scales always; the scales themselves where both span the largest weight."""
    _, dest = places[name]
    theirs, ours = load_file(f"{dest}.packed.safetensors"), load_file(dest / "model.safetensors")
    assert theirs
    for tensor, bytes_of_theirs in theirs.items():
        if not tensor.endswith("scale") or "spanning" in name:
            assert torch.equal(bytes_of_theirs, ours[tensor].view(torch.uint8)), tensor


def test_it_rounds_inputs_as_we_measure_them(places: dict[str, tuple[Path, Path]]) -> None:
    work = places["fp8 dynamic"][1].parent
    inputs, theirs = (load_file(work / f"{name}.safetensors")["inputs"] for name in ("inputs", "rounded"))
    assert torch.equal(fp8.round_tokens(inputs), theirs)
