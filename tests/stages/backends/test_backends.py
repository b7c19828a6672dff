"""The real libraries in their real environments (minutes, and a gigabyte each the first time).

Run: pytest -m "slow and network" tests/stages/backends/test_backends.py
Environments are built in the user's own store, where they stay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from optikit import environments
from optikit.formats import load_state
from optikit.formats.dialects import spoken
from optikit.store.store import Store
from tests.conftest import build_tiny_llama, round_to_gptq

pytestmark = [pytest.mark.slow, pytest.mark.network]
PROMPT, COUNT = [5, 17, 99, 200, 31], 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose every width is a multiple of 64, as AutoAWQ's search for clipping wants it."""
    return build_tiny_llama(tmp_path_factory.mktemp("model"), hidden=128, intermediate=256)


@pytest.mark.parametrize(("method", "backend"), [("awq", "autoawq"), ("gptq", "llm-compressor"), ("gptq", "gptqmodel")])
def test_two_versions_of_transformers_in_one_recipe(model: Path, prose: Path, tmp_path: Path, method, backend) -> None:
    recipe = {
        "model": str(model),
        "calibration": {"text": str(prose), "samples": 4, "length": 64},
        "stages": [
            {"quantize": {"method": method, "backend": backend, "group_size": 32}},
            {"compile": {"engine": "onnxruntime"}},
        ],
        "evaluate": {"perplexity": {"text": str(prose), "window": 32, "windows": 4}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "optikit", "run", path, "--out", tmp_path / "out", "--progress", "plain"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    step = next(step for step in report["steps"] if step["verb"] == "quantize")
    assert step["backend"] == backend
    assert step["facts"]["reader_mismatches"] == 0
    assert step["facts"]["linears_packed"] == 14


def test_autogptq_decodes_what_we_decode_from_a_gptq_directory(model: Path, tmp_path: Path) -> None:
    packed = round_to_gptq(model, tmp_path / "packed")
    config = AutoConfig.from_pretrained(model)
    ours = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ours.load_state_dict(load_state(packed, torch.float32), strict=False)
    ours.tie_weights()
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(COUNT):
            tokens.append(int(ours(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    environment = environments.ensure("auto-gptq", Store.default())
    older = spoken(packed, tmp_path / "older", "4.49")
    settings = json.loads((older / "config.json").read_text())["quantization_config"]
    (older / "quantize_config.json").write_text(json.dumps(settings))  # what auto-gptq 0.7 reads instead
    script = Path(__file__).with_name("autogptq_decodes.py")
    command = [environment.python, script, older, str(COUNT), *map(str, PROMPT)]
    variables = environment.variables({**os.environ, "HF_HUB_OFFLINE": "1"}, tmp_path)
    said = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout.strip().splitlines()[-1]) == tokens[len(PROMPT) :]
