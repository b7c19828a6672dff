"""A packed directory of any kind becomes a model directory with exactly the weights that its codes stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from optikit.errors import IntegrityError, RecipeError
from optikit.formats import loadable
from optikit.models.reader import read
from optikit.plan import make_plan
from optikit.recipe.load import load
from optikit.stage import Job
from optikit.stages.acquire import dequantize as stage
from optikit.store.store import Store
from tests.formats.packings import PACKINGS, TRAITS, write

Fault = Callable[[dict[str, Any], dict[str, Any]], Any]


def acquire(source: Path, dest: Path) -> dict[str, Any]:
    dest.mkdir()
    return stage.run(stage.Options(), Job(source=source, dest=dest, scratch=dest))


@pytest.mark.parametrize("name", PACKINGS)
def test_every_packing_becomes_the_weights_that_it_stands_for(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    meant = write(tiny_llama, tmp_path / "packed", name)
    before = read(tmp_path / "packed")
    assert bool(before.packing) == (name not in TRAITS)
    facts = acquire(tmp_path / "packed", tmp_path / "model")
    assert facts["linears"] == 14
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() == meant.keys()
    for each, weight in meant.items():
        assert found[each].dtype == weight.dtype, each
        assert torch.equal(found[each], weight), each
    promised, after = stage.after(stage.Options(), before), read(tmp_path / "model")
    for each in ("linears", "traits", "weight_bytes", "parameters", "tied", "dtype", "packing", "tokenizer_sha256"):
        assert getattr(promised, each) == getattr(after, each), each
    loadable.require(tmp_path / "model")


def settings(**changes: Any) -> Fault:
    return lambda _, config: config["quantization_config"].update(changes)


def drop(ending: str) -> Fault:
    def fault(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        del tensors[f"model.layers.1.mlp.up_proj.{ending}"]

    return fault


def change(ending: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    def fault(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        name = f"model.layers.1.mlp.up_proj.{ending}"
        tensors[name] = to(tensors[name]).contiguous()

    return fault


def leave(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """One linear is float, and the settings don't name it."""
    name = "model.layers.1.mlp.up_proj."
    for each in [each for each in tensors if each.startswith(name)]:
        del tensors[each]
    tensors[f"{name}weight"] = torch.zeros(128, 64, dtype=torch.bfloat16)


def groups(**weights: Any) -> Fault:
    def fault(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(weights)

    return fault


def mixed(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    told = config["quantization_config"]["config_groups"]
    told["group_1"] = {"targets": ["re:.*up_proj"], "weights": told["group_0"]["weights"] | {"num_bits": 8}}


def undo(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    linears = {name.removesuffix(".qweight"): each for name, each in tensors.items() if name.endswith(".qweight")}
    for name in [name for name in tensors if "_proj." in name]:
        del tensors[name]
    for name, each in linears.items():
        tensors[f"{name}.weight"] = torch.zeros(each.shape[1], each.shape[0] * 8, dtype=torch.bfloat16)


UP = "model.layers.1.mlp.up_proj"
LIES: dict[str, tuple[str, Fault, str]] = {
    "4 bits, tensors of 8": ("gptq 8 bits", settings(bits=4), "8 bits a weight"),
    "8 bits, tensors of 4": ("gptq_v2", settings(bits=8), "4 bits a weight"),
    "3 bits, tensors of 2": ("gptq 2 bits", settings(bits=3), "2 bits a weight"),
    "gptq, another group size": ("gptq 3 bits", settings(group_size=64), r"scales has shape \(2, "),
    "gptq of a stage, another group size": ("gptq 4 bits", settings(group_size=16), r"scales has shape \(2, "),
    "awq, another group size": ("awq gemm", settings(group_size=16), "scales has shape"),
    "W4A16, another group size": ("W4A16", groups(group_size=64), r"weight_scale has shape \(64, 2\)"),
    "W4A16, tensors of 8": ("W8A16", groups(num_bits=4), "8 bits a weight"),
    "W4A16, two numbers of bits": ("W4A16, zero points", mixed, "another number of bits"),
    "another block size": ("FP8 in blocks", settings(weight_block_size=[128, 128]), "weight_scale_inv has shape"),
    "NVFP4, another group size": ("NVFP4", groups(group_size=32), "can't be read"),
    "floats promised, integers there": ("float-quantized", change("weight", lambda t: t.to(torch.int8)), "I8"),
    "FP8 without a scale": ("FP8 in blocks", drop("weight_scale_inv"), "has no weight_scale_inv"),
    "FP8 without its scale, static": ("ModelOpt FP8", drop("weight_scale"), "has no weight_scale"),
    "NVFP4 without its second scale": ("NVFP4", drop("weight_global_scale"), "no tensor"),
    "packed, and named as left": ("FP8 in blocks", settings(modules_to_not_convert=[UP]), "left as it was"),
    "packed, and a pattern names it": ("W4A16", settings(ignore=["re:.*up_proj$"]), "left as it was"),
    "packed, and a wildcard names it": ("ModelOpt NVFP4", settings(ignore=["*up_proj"]), "left as it was"),
    "float, and not named": ("W8A16", leave, "isn't named by ignore"),
    "float, and not named by ModelOpt": ("ModelOpt FP8", leave, "isn't named by ignore"),
    "no linear is packed": ("gptq_v2", undo, "not one is packed"),
    "settings are missing": ("gptq_v2", lambda _, config: config.pop("quantization_config"), "no quantization_config"),
    "settings of floats are missing": (
        "FP8 static",
        lambda _, config: config.pop("quantization_config"),
        "holds packed",
    ),
}
"""Packing, what is wrong, and what is said; all of it known from headers."""


def spoil(directory: Path, fault: Fault) -> None:
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    fault(tensors, config)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("lie", LIES)
def test_settings_that_lie_are_told_from_headers(lie: str, tiny_llama: Path, tmp_path: Path) -> None:
    name, fault, said = LIES[lie]
    write(tiny_llama, tmp_path / "packed", name)
    spoil(tmp_path / "packed", fault)
    with pytest.raises((IntegrityError, RecipeError), match=said) as caught:
        read(tmp_path / "packed")
    assert caught.value.fix


DAMAGE: dict[str, tuple[str, Fault, str]] = {
    "a scale that is no number": (
        "FP8 in blocks",
        change("weight_scale_inv", lambda t: t.fill_(torch.nan)),
        "NaN or infinity",
    ),
    "a weight that is no number": ("FP8 static", change("weight", lambda t: t.float().fill_(torch.nan).to(t)), "NaN"),
    "an exponent that is no number": ("MXFP4", change("weight_scale", lambda t: t.fill_(255)), "NaN"),
    "a group that isn't there": ("gptq_v2", change("g_idx", lambda t: t + 2), "don't go together"),
    "a shape of another linear": ("W4A16", change("weight_shape", lambda t: t + 1), "weight_shape is"),
    "more scales than channels": ("W8A8, static", change("weight_scale", lambda t: t.repeat(2, 1)), "scales of shape"),
}
"""Packing, what is wrong, and what is said, when the bytes are read."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_with_the_name_of_the_linear(damage: str, tiny_llama: Path, tmp_path: Path) -> None:
    name, fault, said = DAMAGE[damage]
    write(tiny_llama, tmp_path / "packed", name)
    spoil(tmp_path / "packed", fault)
    with pytest.raises(IntegrityError, match=said) as caught:
        acquire(tmp_path / "packed", tmp_path / "model")
    assert UP in caught.value.message


def test_a_bias_of_zeros_is_left_out_and_another_one_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    write(tiny_llama, tmp_path / "packed", "gptq_v2")
    spoil(tmp_path / "packed", lambda tensors, _: tensors.update({f"{UP}.bias": torch.zeros(128).half()}))
    acquire(tmp_path / "packed", tmp_path / "model")
    assert f"{UP}.bias" not in load_file(tmp_path / "model" / "model.safetensors")
    spoil(tmp_path / "packed", lambda tensors, _: tensors.update({f"{UP}.bias": torch.ones(128).half()}))
    with pytest.raises(IntegrityError, match="isn't zero"):
        acquire(tmp_path / "packed", tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "stages", "steps"),
    [
        ("gptq_v2", [{"quantize": {"method": "rtn", "group_size": 32}}], ["0-acquire-dequantize", "1-quantize-rtn"]),
        ("gptq_v2", [], ["0-acquire-dequantize"]),
        ("gptq 4 bits", [{"prune": {"method": "magnitude"}}], ["0-acquire-dequantize", "1-prune-magnitude"]),
        ("gptq 4 bits", [{"compile": {"engine": "onnxruntime"}}], ["1-compile-onnxruntime"]),
        ("bitsandbytes NF4", [{"quantize": {"method": "nf4"}}], ["0-acquire-dequantize", "1-quantize-nf4"]),
    ],
)
def test_a_plan_dequantizes_where_a_stage_wants_floats_or_nobody_reads_it(
    name: str, stages: list[Any], steps: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    write(tiny_llama, tmp_path / "packed", name)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": "packed", "target": "cpu", "stages": stages}))
    plan = make_plan(load(tmp_path / "r.yaml"), Store(tmp_path / "home"))
    assert [step.name for step in plan.steps] == steps
    warned = any("are rounded already" in warning.message for warning in plan.warnings)
    assert warned == (len(steps) > 1 and name in TRAITS)
