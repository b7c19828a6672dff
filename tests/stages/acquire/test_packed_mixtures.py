"""Mixtures and wrapped models in packed files: every expert becomes the numbers that its codes stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from optikit.cli.app import app
from optikit.errors import IntegrityError, RecipeError
from optikit.formats import loadable
from optikit.models.reader import read
from optikit.stage import Job
from optikit.stages.acquire import dequantize as stage
from tests.formats.packings import PACKINGS, TRAITS, write
from tests.mixtures import save
from tests.stages.test_wrapped import saved

FAMILIES = {"mixtral": save, "qwen3_moe": save, "deepseek_v3": save, "gemma3": saved, "llava": saved}
CASES = [
    ("mixtral", "gptq 4 bits"),
    ("mixtral", "W4A16"),
    ("qwen3_moe", "gptq_v2"),
    ("qwen3_moe", "FP8 in blocks"),
    ("qwen3_moe", "W8A16"),
    ("deepseek_v3", "FP8 in blocks"),
    ("deepseek_v3", "W4A16"),
    ("qwen3_moe", "MXFP4"),
    ("qwen3_moe", "NVFP4"),
    ("deepseek_v3", "ModelOpt NVFP4"),
    ("mixtral", "float-quantized"),
    ("mixtral", "awq gemm"),
    ("gemma3", "gptq_v2"),
    ("gemma3", "float-quantized"),
    ("llava", "W4A16"),
    ("llava", "FP8 in blocks"),
]


def packed(family: str, directory: Path, name: str) -> dict[str, torch.Tensor]:
    """Write a tiny model of a family whose linears, experts among them, are packed; return what they stand for."""
    source = FAMILIES[family](family, directory / "dense")
    facts = read(source)
    meant = write(source, directory / "packed", name, facts.linears.__contains__)
    told = json.loads((directory / "packed" / "config.json").read_text())
    for key in ("modules_to_not_convert", "ignore"):
        if isinstance(told["quantization_config"].get(key), list):
            told["quantization_config"][key] = ["lm_head", *facts.kept]
    (directory / "packed" / "config.json").write_text(json.dumps(told))
    return meant


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_expert_becomes_what_its_codes_stand_for(family: str, name: str, tmp_path: Path) -> None:
    meant = packed(family, tmp_path, name)
    before = read(tmp_path / "packed")
    assert bool(before.packing) == (name not in TRAITS)
    dest = tmp_path / "model"
    dest.mkdir()
    found = stage.run(stage.Options(), Job(source=tmp_path / "packed", dest=dest, scratch=dest))
    assert found["linears"] == len(before.linears)
    tensors = load_file(dest / "model.safetensors")
    assert tensors.keys() == meant.keys()
    for each, weight in meant.items():
        assert tensors[each].dtype == weight.dtype, each
        assert torch.equal(tensors[each], weight), each
    promised, after = stage.after(stage.Options(), before), read(dest)
    for key in ("linears", "traits", "tied", "dtype", "experts", "carried", "routers", "parameters"):
        assert getattr(promised, key) == getattr(after, key), key
    loadable.require(dest)


@pytest.mark.parametrize(
    ("family", "name"),
    [("deepseek_v3", "FP8 in blocks"), pytest.param("gemma3", "gptq_v2", marks=pytest.mark.slow)],
)
def test_packed_files_go_through_the_command(family: str, name: str, prose: Path, tmp_path: Path) -> None:
    packed(family, tmp_path, name)
    recipe: dict[str, Any] = {
        "model": str(tmp_path / "packed"),
        "target": "cpu",
        "calibration": {"text": str(prose), "samples": 3, "length": 40},
        "stages": [{"quantize": {"method": "gptq", "group_size": 32}}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    (written,) = [path.parent for path in (tmp_path / "out").rglob("model.safetensors")]
    assert read(written).traits == frozenset({"int4_gptq"})


EXPERT = "model.layers.1.mlp.experts.2.up_proj"
LIES: dict[str, tuple[str, str, Any, str]] = {
    "an expert without its scale": (
        "deepseek_v3", "FP8 in blocks", lambda t: t.pop(f"{EXPERT}.weight_scale_inv"), "has no weight_scale_inv",
    ),
    "scales of another block size": (
        "qwen3_moe", "FP8 in blocks",
        lambda t: t.update({f"{EXPERT}.weight_scale_inv": torch.ones(3, 3)}), "weight_scale_inv has shape",
    ),
    "an expert of other bits": (
        "qwen3_moe", "gptq_v2",
        lambda t: t.update({f"{EXPERT}.qweight": torch.cat([t[f"{EXPERT}.qweight"]] * 2)}), "bits a weight",
    ),
    "an expert is missing": (
        "qwen3_moe", "W8A16", lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{EXPERT}.")],
        "isn't named by ignore|no weights for",
    ),
    "an expert that is float, and not named": (
        "qwen3_moe", "FP8 in blocks",
        lambda t: (
            t.pop(f"{EXPERT}.weight_scale_inv"),
            t.update({f"{EXPERT}.weight": torch.zeros(32, 64, dtype=torch.bfloat16)}),
        ),
        "isn't named by modules_to_not_convert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_an_expert_that_contradicts_its_settings_is_named(lie: str, tmp_path: Path) -> None:
    family, name, edit, said = LIES[lie]
    packed(family, tmp_path, name)
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, path, {"format": "pt"})
    with pytest.raises((IntegrityError, RecipeError), match=said) as caught:
        read(tmp_path / "packed")
    assert EXPERT in caught.value.message
    assert caught.value.fix


def test_a_scale_of_an_expert_that_is_no_number_is_named(tmp_path: Path) -> None:
    packed("deepseek_v3", tmp_path, "FP8 in blocks")
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{EXPERT}.weight_scale_inv"][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(IntegrityError, match=rf"{EXPERT}.* holds NaN"):
        stage.run(stage.Options(), Job(source=tmp_path / "packed", dest=tmp_path, scratch=tmp_path))


def test_every_packing_that_is_tried_is_one() -> None:
    assert {name for _, name in CASES} <= PACKINGS.keys()
