"""A loss of one per cent, planted in a real model, is found by 16 windows of 512 tokens.

Run: pytest -m "slow and network" tests/stages/measure/test_measure_loss.py
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from optikit.recipe.schema import Text
from optikit.stage import Job
from optikit.stages.measure import quality
from optikit.store.sources import resolve_text
from optikit.store.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.network]
PLANTED = 1.01
RECIPE = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


def scored(model: Path, text: Path, dest: Path, baseline: Path | None = None) -> dict[str, Any]:
    dest.mkdir()
    inputs = {"text": text, "tokenizer": model} | ({"baseline": baseline} if baseline else {})
    options = quality.Options(window=512, windows=16)
    facts: dict[str, Any] = quality.run(options, Job(source=model, dest=dest, scratch=dest / "scratch", inputs=inputs))
    return facts["perplexity"]


def noisy(model: Path, dest: Path, scale: float) -> Path:
    """Copy a model, with noise in its linears that is `scale` of each one's own spread."""
    shutil.copytree(model, dest)
    draw = torch.Generator().manual_seed(0)
    tensors = load_file(dest / "model.safetensors")
    for name, each in tensors.items():
        if each.ndim == 2 and "embed" not in name:
            noise = torch.randn(each.shape, generator=draw) * each.float().std() * scale
            tensors[name] = (each.float() + noise).to(each.dtype)
    save_file(tensors, dest / "model.safetensors", metadata={"format": "pt"})
    return dest


def test_a_planted_loss_of_one_per_cent_is_found(smollm2: Path, tmp_path: Path) -> None:
    written = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    pieces = {}
    for name, place in (("tune", written["calibration"]), ("judge", written["evaluate"]["perplexity"])):
        asked = Text.model_validate({each: place[each] for each in Text.model_fields if each in place})
        pieces[name] = resolve_text(asked, Store.default(), base=Path(), offline=False, note=print).path
    # Noise costs its square: one trial on other text says how much of it costs one per cent.
    base = scored(smollm2, pieces["tune"], tmp_path / "base")
    trial = noisy(smollm2, tmp_path / "trial-model", 0.05)
    lost = scored(trial, pieces["tune"], tmp_path / "trial", tmp_path / "base")["ratio"]
    scale = 0.05 * math.sqrt(math.log(PLANTED) / math.log(lost))
    planted = noisy(smollm2, tmp_path / "planted-model", scale)
    scored(smollm2, pieces["judge"], tmp_path / "judge-base")
    found = scored(planted, pieces["judge"], tmp_path / "judge", tmp_path / "judge-base")
    assert base["value"] > 1
    assert found["ratio"] == pytest.approx(PLANTED, abs=0.006)
    assert found["ratio_ci95"][0] > 1, found
