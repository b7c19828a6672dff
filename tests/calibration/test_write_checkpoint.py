"""AWQ and SmoothQuant through the walk: what is folded away cancels exactly, and the scales pay off."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optikit import formats, stages
from optikit.calibration import calibration_set
from optikit.calibration.method import PreviousOp
from optikit.calibration.methods.fold import fold
from optikit.calibration.source_model import SourceModel
from optikit.errors import StageFailedError
from optikit.formats import activations
from optikit.formats.checkpoint import Checkpoint
from optikit.stage import Calibration, Job


def loud(source: Path, directory: Path) -> Path:
    """Copy a model and make a few channels of its norms and of its value and up projections thirty times louder."""
    shutil.copytree(source, directory, dirs_exist_ok=True)
    state = load_file(directory / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("layernorm.weight"):
            tensor[torch.randperm(len(tensor), generator=draw)[:4]] *= 30
        if name.endswith(("v_proj.weight", "up_proj.weight")):
            tensor[torch.randperm(len(tensor), generator=draw)[:4]] *= 30
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def source(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud(tiny_llama, tmp_path_factory.mktemp("loud"))


def make(method: str, options: dict[str, Any], source: Path, prose: Path, directory: Path) -> tuple[Path, Any]:
    stage = stages.load("quantize", method)
    for name in ("model", "scratch"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    job = Job(
        source=source,
        dest=directory / "model",
        scratch=directory / "scratch",
        calibration=Calibration(text=prose, samples=8, length=64)
        if "calibration" in stage.inputs(stage.Options())
        else None,
    )
    return directory / "model", stage.run(stage.Options(**options), job)


RANDOM = torch.randint(3, 260, (4, 60), generator=torch.Generator().manual_seed(1))


def logits(directory: Path, tokens: Tensor = RANDOM) -> Tensor:
    """Compute in float32, inputs of linears rounded where a server would round them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(formats.load_state(directory, torch.float32), strict=False)
    model.tie_weights()
    for name, rounding in activations.of(directory).items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, how=rounding: how(args[0]))
    with torch.no_grad():
        return model(tokens).logits


def off(directory: Path, source: Path, tokens: Tensor = RANDOM) -> float:
    dense = logits(source, tokens)
    return float((logits(directory, tokens) - dense).norm() / dense.norm())


def test_awq_beats_rounding_on_loud_channels(source, prose, tmp_path):
    plain, _ = make("rtn", {"group_size": 32, "sym": False}, source, prose, tmp_path / "rtn")
    scaled, facts = make("awq", {"group_size": 32}, source, prose, tmp_path / "awq")
    assert facts["linears_scaled"] == facts["linears_packed"] == 14
    assert off(scaled, source) < 0.7 * off(plain, source)


def test_awq_then_gptq_beats_awq(source, prose, tmp_path):
    nearest, first = make("awq", {"group_size": 32}, source, prose, tmp_path / "nearest")
    rounded, second = make("awq", {"group_size": 32, "rounding": "gptq"}, source, prose, tmp_path / "gptq")
    assert second["relative_loss_mean"] < 0.8 * first["relative_loss_mean"]
    other = calibration_set.draw(
        source, prose, samples=8, length=60, seed=1
    )  # what both were calibrated for: passages of this
    assert off(rounded, source, other) < off(nearest, source, other)


def test_smoothing_pays_off_on_loud_channels(source, prose, tmp_path):
    rough, _ = make("int8", {"scheme": "w8a8", "smooth": "none"}, source, prose, tmp_path / "none")
    smooth, facts = make("int8", {"scheme": "w8a8"}, source, prose, tmp_path / "search")
    assert facts["linears_scaled"] == 14
    assert off(smooth, source) < 0.5 * off(rough, source)


def test_norms_change_only_where_all_they_feed_was_scaled(source, prose, tmp_path):
    options = {"group_size": 32, "ignore": ["layers.0.self_attn.k_proj", "layers.1.mlp.up_proj"]}
    directory, _ = make("awq", options, source, prose, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (source, directory))
    same = {name: torch.equal(before[name], after[name]) for name in before if name in after}
    assert same["model.layers.0.input_layernorm.weight"]  # feeds k_proj, which was left alone
    assert not same["model.layers.1.input_layernorm.weight"]
    assert same["model.layers.1.post_attention_layernorm.weight"]
    assert same["model.norm.weight"]
    assert same["model.layers.0.self_attn.k_proj.weight"]
    assert same["model.layers.1.mlp.up_proj.weight"]  # feeds down_proj, but is dense: nothing may touch it
    assert off(directory, source) < 0.2


@pytest.mark.parametrize("suffix", ["qweight", "scales"])
def test_what_is_not_what_was_promised_fails_by_name(source, prose, tmp_path, monkeypatch, suffix):
    from optikit.formats import packing

    honest = packing.AWQ_GEMM.pack

    def broken(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        packed = honest(codes, scales, zeros)
        packed[suffix] = packed[suffix].flip(0)
        return packed

    monkeypatch.setattr(packing, "AWQ_GEMM", replace(packing.AWQ_GEMM, pack=broken))
    with pytest.raises(StageFailedError, match=r"model\.layers\.\d\..*_proj is off by"):
        make("awq", {"group_size": 32}, source, prose, tmp_path)


def test_scales_that_were_applied_twice_are_noticed(source, prose, tmp_path, monkeypatch):
    """What AutoAWQ does on a CPU: linears behind a norm are multiplied by their scales once more than it is divided."""
    from optikit.formats import directory

    honest = directory.write_model
    norm = "model.layers.1.post_attention_layernorm.weight"

    def doubled(origin, dest, entries, **more):
        honest(origin, dest, entries, **more)
        tensors = load_file(dest / "model.safetensors")
        scale = torch.linspace(0.3, 3.0, len(tensors[norm]))
        tensors[norm] = (tensors[norm] * scale).to(tensors[norm].dtype)
        save_file(tensors, dest / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("optikit.calibration.write_checkpoint.write_model", doubled)
    with pytest.raises(StageFailedError, match=r"model\.layers\.1\.mlp\..*_proj is off by"):
        make("awq", {"group_size": 32}, source, prose, tmp_path)


def test_ties_name_the_value_channel_that_an_attention_output_copies(tiny_llama):
    model = SourceModel(Checkpoint(tiny_llama))
    (out,) = model.groups(0, lambda _: False)[1]
    previous = model.previous_op(0, (out,), lambda _: False, {})
    assert previous is not None
    assert previous.ties is not None
    heads, kv_heads, head_dim = 4, 2, 16
    slow = [h // (heads // kv_heads) * head_dim + d for h in range(heads) for d in range(head_dim)]
    assert previous.ties.tolist() == slow


@pytest.mark.parametrize("ties", [None, torch.arange(12) % 6])
def test_folding_into_a_quantized_linear_cancels(ties):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (12 if ties is None else 6, 20), generator=draw).float()
    scales, bias = torch.rand(len(codes), 1, generator=draw).bfloat16(), torch.randn(len(codes), generator=draw)
    scale = torch.rand(len(codes), generator=draw) + 0.2
    wanted = scale if ties is None else scale[ties]
    previous = PreviousOp(name="v", tensors={"v.weight_scale": scales, "v.bias": bias}, linear=True, ties=ties)
    changed, exact = fold(previous, wanted, suffix="weight_scale", axis=0)
    inputs = torch.randn(30, 20, generator=draw)
    before = inputs @ (codes * scales.float()).T + bias
    after = inputs @ (codes * changed["v.weight_scale"].float()).T + changed["v.bias"]
    copied = (lambda x: x) if ties is None else (lambda x: x[:, ties])
    assert torch.allclose(copied(after) * exact, copied(before), rtol=1e-4, atol=1e-4)
    assert torch.allclose(exact, wanted, rtol=0.01)
