"""Dense state dicts of packed directories: every format that a stage writes comes back as the weights it means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit import formats
from optikit.algorithms.nf4 import LEVELS
from optikit.errors import IntegrityError, RecipeError
from optikit.formats import activations, awq, compressed_tensors, gptq, llm_int8, nf4
from optikit.models import quantization

CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "group_0": {part: {"num_bits": 8, "type": "int"} for part in ("weights", "input_activations")}
        },
    },
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
CODES = torch.arange(16 * 32, dtype=torch.int32).reshape(16, 32) * 7 % 16
SCALES = (torch.arange(16 * 2).reshape(16, 2) + 1).half() / 64
ZEROS = (torch.arange(16 * 2).reshape(16, 2) % 15 + 1).to(torch.uint8)


def packed(method: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A linear in one packing, and its weight computed element by element."""
    if method in ("compressed-tensors", "bitsandbytes"):
        codes, scales = (CODES - 8).to(torch.int8), SCALES[:, :1].bfloat16()
        slow = [[codes[o, i].item() * scales[o, 0].item() for i in range(32)] for o in range(16)]
        pack = compressed_tensors.pack if method == "compressed-tensors" else llm_int8.pack
        return pack(codes, scales), torch.tensor(slow)
    if method == "nf4":
        extremes = torch.arange(8) / 4.0
        blocks = [[LEVELS[CODES[o, i].item()] * extremes[(o * 32 + i) // 64].item() for i in range(32)]
                  for o in range(16)]  # fmt: skip
        return nf4.pack(CODES.to(torch.uint8).view(-1), extremes, (16, 32), "bfloat16"), torch.tensor(blocks)
    slow = [[(CODES[o, i].item() - ZEROS[o, i // 16].item()) * SCALES[o, i // 16].item() for i in range(32)]
            for o in range(16)]  # fmt: skip
    codes = CODES.to(torch.uint8)
    tensors = gptq.pack(codes, SCALES, ZEROS, 4) if method == "gptq" else awq.pack(codes, SCALES, ZEROS)
    return tensors, torch.tensor(slow)


def write(directory: Path, method: str, model_type: str = "llama") -> torch.Tensor:
    tensors, weight = packed(method)
    stored = {f"a.q_proj.{suffix}": tensor for suffix, tensor in tensors.items()}
    stored |= {"a.o_proj.weight": torch.ones(4, 4).bfloat16(), "norm.weight": torch.full((4,), 2.0).bfloat16()}
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    config = {"model_type": model_type, "quantization_config": CONFIGS[method]}
    (directory / "config.json").write_text(json.dumps(config))
    return weight


@pytest.mark.parametrize("method", CONFIGS)
def test_packed_linears_come_back_as_weights_and_dense_ones_as_they_are(tmp_path, method):
    weight = write(tmp_path, method)
    state = formats.load_state(tmp_path, torch.float32)
    assert set(state) == {"a.q_proj.weight", "a.o_proj.weight", "norm.weight"}
    assert torch.allclose(state["a.q_proj.weight"], weight, rtol=1e-6)
    assert torch.equal(state["a.o_proj.weight"], torch.ones(4, 4))
    assert state["norm.weight"].dtype == torch.float32
    assert dict(formats.dequantized_state(tmp_path))["norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("method", CONFIGS)
def test_transposed_families_get_their_layout_back(tmp_path, method):
    weight = write(tmp_path, method, model_type="gpt2")
    found = formats.load_state(tmp_path, torch.float32)["a.q_proj.weight"]
    assert torch.allclose(found, weight.T, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("gptq", "checkpoint_format", "marlin"),
        ("awq", "version", "gemv_fast"),
        ("compressed-tensors", "format", "dense"),
        ("bitsandbytes", "load_in_8bit", False),
        ("nf4", "bnb_4bit_quant_type", "int4"),
    ],
)
def test_other_dialects_are_refused_by_name(tmp_path, method, key, value):
    write(tmp_path, method)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=str(value)):
        formats.load_state(tmp_path, torch.float32)


def test_the_case_of_a_version_does_not_matter(tmp_path):
    weight = write(tmp_path, "awq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = "GEMM"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.allclose(formats.load_state(tmp_path, torch.float32)["a.q_proj.weight"], weight, rtol=1e-6)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["norm.weight", "a.o_proj.weight", "scales"])
def test_a_number_that_is_not_finite_is_named(tmp_path, method, name):
    write(tmp_path, method)
    state = load_file(tmp_path / "model.safetensors")
    name = name if name in state else f"a.q_proj.{'weight_scale' if method == 'compressed-tensors' else 'scales'}"
    state[name].view(-1)[1] = float("nan")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=name.rpartition(".")[0]):
        formats.load_state(tmp_path, torch.float32)


def test_what_is_read_is_what_rows_say(tmp_path):
    for method, config in CONFIGS.items():
        suffixes = set(packed(method)[0])
        row = quantization.scheme({"quantization_config": config}, tmp_path)
        assert set(row.suffixes) <= suffixes <= {*row.suffixes, *row.optional}


def test_only_w8a8_rounds_activations_here(tmp_path):
    write(tmp_path, "awq")
    assert activations.of(tmp_path) == {}
    write(tmp_path, "compressed-tensors")
    assert set(activations.of(tmp_path)) == {"a.q_proj"}


@pytest.mark.parametrize("value", [0.0, 1e-3])
def test_a_bias_that_no_module_has_is_zero(tiny_gptq, tmp_path, value):
    shutil.copytree(tiny_gptq, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.bias"
    bias = torch.zeros(tensors["model.norm.weight"].shape[0], dtype=torch.float16)
    bias[5] = value
    save_file(tensors | {name: bias}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    if value:
        with pytest.raises(IntegrityError, match=f"{name} isn't zero"):
            formats.load_state(tmp_path / "m", torch.float32)
    else:
        assert (
            formats.load_state(tmp_path / "m", torch.float32).keys()
            == formats.load_state(tiny_gptq, torch.float32).keys()
        )
