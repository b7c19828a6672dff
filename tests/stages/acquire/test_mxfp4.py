"""gpt-oss as it is published: stacked experts in MXFP4 become the weights that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from optikit import stages
from optikit.cli.app import app
from optikit.errors import IntegrityError, RecipeError
from optikit.formats import census, loadable
from optikit.models.reader import read
from optikit.stage import Job
from optikit.stages.acquire import dequantize as stage
from tests.conftest import byte_tokenizer
from tests.mixtures import COMMON, FAMILIES
from tests.stages.test_mixtures import logits

SIZES = COMMON | FAMILIES["gpt_oss"]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss with random codes and scales, under the names of the published checkpoints."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("gpt-oss")
    config = AutoConfig.for_model("gpt_oss", **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if key.endswith(("bias", "sinks")) else 0
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    told = json.loads((directory / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    told["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (directory / "config.json").write_text(json.dumps(told))
    byte_tokenizer(directory)
    return directory


def edited(published: Path, directory: Path, edit: Any) -> Path:
    directory.mkdir()
    tensors, told = load_file(published / "model.safetensors"), json.loads((published / "config.json").read_text())
    edit(tensors, told)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(told))
    byte_tokenizer(directory)
    return directory


def test_the_facts_are_those_of_the_floats(published: Path) -> None:
    facts = read(published)
    assert facts.packing == "MXFP4, 4 bits"
    assert facts.traits == frozenset()
    assert facts.linears["model.layers.1.mlp.experts.3.up_proj"] == (32, 64)
    assert (facts.experts, facts.experts_chosen) == (4, 2)


def test_floats_are_bit_by_bit_those_of_transformers(published: Path, tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    before = read(published)
    found = stage.run(stage.Options(), Job(source=published, dest=tmp_path, scratch=tmp_path))
    assert found["linears"] == 4
    packed, floats = load_file(published / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for name, tensor in packed.items():
        if name.endswith("_blocks"):
            whole = name.removesuffix("_blocks")
            theirs = convert_moe_packed_tensors(tensor, packed[f"{whole}_scales"], dtype=torch.bfloat16)
            assert torch.equal(floats[whole].view(torch.int16), theirs.view(torch.int16))
        elif not name.endswith("_scales"):
            assert torch.equal(floats[name], tensor)
    loadable.require(tmp_path)
    promised, after = stage.after(stage.Options(), before), read(tmp_path)
    for each in ("linears", "traits", "tied", "dtype", "packing", "experts", "routers"):
        assert getattr(promised, each) == getattr(after, each), each


def test_the_published_files_go_through_the_command(published: Path, prose: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "model": str(published),
                "target": "cpu",
                "calibration": {"text": str(prose), "samples": 3, "length": 40},
                "stages": [{"quantize": {"method": "gptq", "group_size": 32}}],
            }
        )
    )
    done = CliRunner().invoke(app, ["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    (written,) = [path.parent for path in (tmp_path / "out").rglob("model.safetensors")]
    tokens = torch.randint(3, 260, (2, 48), generator=torch.Generator().manual_seed(1))
    before, after = logits(published, tokens), logits(written, tokens)
    assert 0 < float((after - before).norm() / before.norm()) < 0.5
    names = load_file(written / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.gate_proj.qweight" in names
    assert "model.layers.0.mlp.experts.3.gate_proj.bias" in names


def _rename(tensors: dict[str, Any], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


BROKEN: dict[str, tuple[Any, str]] = {
    "scales are missing": (
        lambda t, _: t.pop("model.layers.0.mlp.experts.down_proj_scales"),
        "has no scales beside it",
    ),
    "codes are missing": (lambda t, _: t.pop("model.layers.1.mlp.experts.gate_up_proj_blocks"), "has no weights for"),
    "a scale a row": (
        lambda t, _: t.update({n: s[..., :1].squeeze(-1) for n, s in t.items() if n.endswith("_proj_scales")}),
        "a scale a group",
    ),
    "an expert is missing": (
        lambda t, _: t.update({n: s[:3] for n, s in t.items() if n.endswith(("_blocks", "_scales"))}),
        r"has shape \(3, 32, 64\), and \(4, 32, 64\) is promised",
    ),
    "not told": (lambda _, told: told.pop("quantization_config"), "holds packed weights"),
    "told, and floats there": (
        lambda t, _: [t.pop(n) for n in list(t) if n.endswith(("_blocks", "_scales"))],
        "not one is packed",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_lies_is_told_from_headers(case: str, published: Path, tmp_path: Path) -> None:
    edit, said = BROKEN[case]
    with pytest.raises((IntegrityError, RecipeError), match=said) as caught:
        read(edited(published, tmp_path / "broken", edit))
    assert caught.value.fix


def test_a_scale_that_is_no_number_is_told(published: Path, tmp_path: Path) -> None:
    source = edited(
        published, tmp_path / "broken", lambda t, _: t["model.layers.1.mlp.experts.down_proj_scales"][2, 5].fill_(255)
    )
    with pytest.raises(IntegrityError, match=r"layers\.1\.mlp\.experts\.down_proj holds NaN"):
        stage.run(stage.Options(), Job(source=source, dest=tmp_path, scratch=tmp_path))


def test_a_tensor_with_two_experts_exchanged_is_noticed(published: Path, prose: Path, tmp_path: Path) -> None:
    """The census compares every expert with its own weights."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    stage.run(stage.Options(), Job(source=published, dest=tmp_path / "a", scratch=tmp_path))
    rtn = stages.load("quantize", "rtn")
    (tmp_path / "scratch").mkdir()
    found = rtn.run(
        rtn.Options(group_size=32, ignore=["*.self_attn.*", "*.experts.1.*"]),
        Job(source=tmp_path / "a", dest=tmp_path / "b", scratch=tmp_path / "scratch"),
    )
    census.take(tmp_path / "a", tmp_path / "b", rtn.CHANGES, found)
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    tensors[name] = tensors[name.replace("gate", "up")].clone()
    save_file(tensors, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"experts\.1\.gate_proj\.weight differs"):
        census.take(tmp_path / "a", tmp_path / "b", rtn.CHANGES, found)
