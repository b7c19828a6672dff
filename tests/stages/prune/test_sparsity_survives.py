"""Prune, then quantize: what pruning made zero is zero in what the quantizer wrote, through both stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optikit import formats, stages
from optikit.formats.checkpoint import Checkpoint
from optikit.models.reader import read
from optikit.stage import Calibration, Job


def perform(verb: str, method: str, options: dict[str, Any], source: Path, prose: Path, place: Path) -> Path:
    for name in ("model", "scratch"):
        (place / name).mkdir(parents=True)
    stage = stages.load(verb, method)
    calibration = Calibration(text=prose, samples=4, length=40)
    job = Job(source=source, dest=place / "model", scratch=place / "scratch", calibration=calibration)
    stage.run(stage.Options(**options), job)
    return place / "model"


@pytest.fixture(scope="module", params=[{"pattern": "2:4"}, {"sparsity": 0.7}], ids=["2:4", "unstructured"])
def pruned(request, tiny_llama, prose, tmp_path_factory) -> Path:
    return perform("prune", "sparsegpt", request.param, tiny_llama, prose, tmp_path_factory.mktemp("pruned"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"group_size": 32}),
        ("rtn", {"group_size": 32, "sym": False}),
        ("gptq", {"group_size": 32}),
        ("gptq", {"group_size": 32, "sym": False, "act_order": False}),
        ("awq", {"group_size": 32, "steps": 3}),
        ("awq", {"group_size": 32, "steps": 3, "rounding": "gptq"}),
        ("int8", {"group_size": 32}),
        ("int8", {"scheme": "w8a8"}),
        ("int8", {"scheme": "llm_int8"}),
        ("nf4", {}),
    ],
    ids=str,
)
def test_zeros_stay_zeros(method, options, pruned, prose, tmp_path):
    written = perform("quantize", method, options, pruned, prose, tmp_path)
    before, after = Checkpoint(pruned), formats.load_state(written, torch.float32)
    for name in read(pruned).linears:
        zeros = before.read(f"{name}.weight") == 0
        assert zeros.float().mean() >= 0.49
        weight = after[f"{name}.weight"]
        assert (weight[zeros] == 0).all(), name
        assert (weight[~zeros] != 0).float().mean() > 0.5, name
