"""Whatever computes on a device does so on one that isn't the processor, and finds the same, bit by bit.

The device is `second_device`: the processor's memory and arithmetic, and CUDA's refusals. That it refuses is tested
here, too. Losses are compared where a training begins: what rounding adds to them grows with every step.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda import parts

ESSENTIAL = ("prune-wanda", "quantize-gptq-packed", "finetune-lora", "measure-quality-streamed", "decoding")
REFUSALS = """
import torch
from tests.cuda import second_device
second_device.install()
here, there = torch.ones(3, 3), torch.ones(3, 3, device=second_device.NAME)
refused = {
    "both": lambda: here + there,
    "product": lambda: there @ here,
    "numpy": lambda: there.numpy(),
    "asarray": lambda: __import__("numpy").asarray(there),
    "index": lambda: here[torch.tensor([0], device=second_device.NAME)],
    "stack": lambda: torch.stack([here, there]),
    "generator": lambda: there.uniform_(generator=torch.Generator()),
    "integers": lambda: there.int() @ there.int(),
    "memory": lambda: memoryview(there.reshape(-1).view(torch.uint8).numpy()),
}
for name, do in refused.items():
    try:
        do()
    except (RuntimeError, TypeError, NotImplementedError):
        continue
    raise SystemExit(f"{name} is let through")
allowed = there + torch.tensor(2.0) + there[torch.tensor([0, 1, 2])] + here.to(second_device.NAME)
assert allowed.cpu().tolist() == [[5.0] * 3] * 3
assert (there.mean().item(), there[0].tolist(), str(there.device)) == (1.0, [1.0] * 3, "cudasim:0")
"""


def compared(directory: Path, names: list[str]) -> dict[str, str]:
    """Return what differs, by part; "" where nothing does."""
    command = [sys.executable, "-m", "tests.cuda.second_device", str(directory), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["what"] for row in rows] == [name for name in parts.PARTS if name in names], done.stderr[-2000:]
    return {row["what"]: row["error"] for row in rows}


def test_the_second_device_refuses_what_cuda_does():
    done = subprocess.run(
        [sys.executable, "-c", REFUSALS], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_essential_parts_find_the_same_there(tmp_path):
    assert compared(tmp_path, list(ESSENTIAL)) == dict.fromkeys(ESSENTIAL, "")


@pytest.mark.slow
def test_all_parts_find_the_same_there(tmp_path):
    names = [name for name in parts.PARTS if name not in {*ESSENTIAL, *parts.OWN_PROCESS}]
    assert compared(tmp_path, names) == dict.fromkeys(names, "")
