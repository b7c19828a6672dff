"""Correction of a block that adds little to the residual stream, as block expansion leaves it: bounded, not refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optikit import formats, stages
from optikit.calibration import calibration_set
from optikit.errors import StageFailedError
from optikit.stage import Calibration, Job

SMALL = ("layers.1.self_attn.o_proj.weight", "layers.1.mlp.down_proj.weight")
OTHER_TEXT = 5
"""Seed that draws other passages than the walk's own."""


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import build_tiny_llama

    directory = tmp_path_factory.mktemp("expanded")
    shutil.copytree(build_tiny_llama(tmp_path_factory.mktemp("four"), layers=4), directory, dirs_exist_ok=True)
    state = load_file(directory / "model.safetensors")
    for name in state:
        if name.endswith(SMALL):
            state[name] *= 0.03
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


def run(source: Path, prose: Path, place: Path, method: str, *, samples: int = 16, **options):
    for name in ("dest", "scratch"):
        (place / name).mkdir(parents=True)
    stage = stages.load("prune" if method == "sparsegpt" else "quantize", method)
    grid = {} if method == "sparsegpt" else {"group_size": 32}
    calibration = Calibration(text=prose, samples=samples, length=64)
    job = Job(source=source, dest=place / "dest", scratch=place / "scratch", calibration=calibration)
    return stage.run(stage.Options(**grid, **options), job)


def distributions(directory: Path, source: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    model.load_state_dict(formats.load_state(directory, torch.float32), strict=False)
    model.tie_weights()
    with torch.no_grad():
        return torch.log_softmax(model(tokens).logits, dim=-1)


@pytest.mark.parametrize("samples", [2, 16])
@pytest.mark.parametrize("method", ["gptq", "awq", "sparsegpt"])
def test_a_correction_costs_no_divergence(expanded, prose, tmp_path, method, samples):
    tokens = calibration_set.draw(expanded, prose, samples=24, length=60, seed=OTHER_TEXT)
    dense = distributions(expanded, expanded, tokens)
    lost = {}
    for correct in (False, True):
        place = tmp_path / str(correct)
        facts = run(expanded, prose, place, method, samples=samples, correct=correct)
        apart = dense - distributions(place / "dest", expanded, tokens)
        lost[correct] = float((dense.exp() * apart).sum(-1).mean())
    assert lost[True] <= (1.25 if samples == 2 else 1) * lost[False]  # of two windows, one alone chooses how far to go
    assert facts["linears_corrected"] + facts["linears_uncorrected"] == 28
    assert 0 < facts["correction_mean"] < 1


def test_one_window_leaves_nothing_to_try_a_correction_on(expanded, prose, tmp_path):
    facts = run(expanded, prose, tmp_path / "yes", "gptq", samples=1)
    plain = run(expanded, prose, tmp_path / "no", "gptq", samples=1, correct=False)
    assert (facts["correction_mean"], facts["linears_uncorrected"]) == (0, 28)
    assert "correction_mean" not in plain
    written = [load_file(tmp_path / each / "dest" / "model.safetensors") for each in ("yes", "no")]
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())
    assert len(written[0]) == len(written[1])  # what is kept to verify with stays out of the model


@pytest.mark.parametrize("suffix", ["qweight", "scales"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_is_not_what_was_aimed_at_fails_by_name(expanded, prose, tmp_path, monkeypatch, method, suffix):
    from optikit.formats import packing

    plain = packing.integers(method, 4, sym=method == "gptq")
    calls = []

    def broken(*parts):
        packed = plain.pack(*parts)
        calls.append(suffix)
        if len(calls) == 11:  # the small writer of attention in the second block
            packed[suffix] = packed[suffix].flip(0) if suffix == "qweight" else 3 * packed[suffix]
        return packed

    monkeypatch.setattr(packing, "integers", lambda *_, **__: replace(plain, pack=broken))
    monkeypatch.setattr("optikit.calibration.write_checkpoint.integers", packing.integers)
    with pytest.raises(StageFailedError, match=r"model\.layers\.1\.self_attn\.o_proj is off by") as failed:
        run(expanded, prose, tmp_path, method)
    assert "defect of optikit or of the disk" in failed.value.fix
