"""What became of every tensor, over all rows and stages; and that a lost, strange or changed one fails the step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit import stages
from optikit.errors import IntegrityError
from optikit.formats import census
from optikit.stage import Calibration, Changing, Job
from tests.families import CONFIGS, save

STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rtn": ("quantize", "rtn", {"group_size": 32}),
    "awq": ("quantize", "awq", {"group_size": 32, "steps": 3, "correct": False}),
    "w8a8": ("quantize", "int8", {"scheme": "w8a8"}),
    "nf4": ("quantize", "nf4", {}),
    "magnitude": ("prune", "magnitude", {"sparsity": 0.3}),
    "depth": ("prune", "depth", {"ratio": 0.5, "keep_last": 0}),
    "width": ("prune", "width", {"multiple": 16, "importance": "contribution"}),
}


def changed(source: Path, place: Path, text: Path, name: str) -> dict[str, Any]:
    """Run a stage and return what it found out; its result is in `place`/model."""
    verb, method, options = STAGES[name]
    stage = stages.load(verb, method)
    assert isinstance(stage, Changing)
    for folder in ("model", "scratch"):
        (place / folder).mkdir()
    calibration = Calibration(text=text, samples=2, length=32)
    job = Job(source=source, dest=place / "model", scratch=place / "scratch", calibration=calibration)
    found: dict[str, Any] = stage.run(stage.Options(**options), job)
    return {**found, "changes": stage.CHANGES}


@pytest.mark.parametrize(("name", "wanted"), [
    ("rtn", (6, 0, 14, {})),
    ("awq", (2, 4, 14, {})),
    ("w8a8", (2, 18, 0, {})),
    ("nf4", (6, 14, 0, {})),
    ("magnitude", (6, 14, 0, {})),
    ("depth", (11, 0, 0, {"its block was left out": 9})),
    ("width", (14, 6, 0, {})),
])  # fmt: skip
def test_all_are_counted(tiny_llama: Path, prose: Path, tmp_path: Path, name: str, wanted: Any) -> None:
    found = changed(tiny_llama, tmp_path, prose, name)
    counted = census.take(tiny_llama, tmp_path / "model", found["changes"], found)
    same, other, replaced, dropped = wanted
    total = counted.same + counted.changed + counted.replaced + sum(counted.dropped.values())
    assert total == len(load_file(tiny_llama / "model.safetensors")) == 20
    assert (counted.replaced, dict(counted.dropped)) == (replaced, dropped)
    assert counted.changed <= other
    assert counted.same >= same


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama"])
def test_none_is_unaccounted_in_any_row(name: str, prose: Path, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    found = changed(source, tmp_path, prose, "rtn")
    counted = census.take(source, tmp_path / "model", "linears", found)
    assert counted.same + counted.replaced == len(load_file(source / "model.safetensors"))
    assert counted.replaced


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


FAULTS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "embedding": _without("model.embed_tokens.weight"),
    "norm": _without("model.norm.weight"),
    "q_norm": _without("model.layers.1.self_attn.q_norm.weight"),
    "head": _without("lm_head.weight"),
    "bias": _without("model.layers.0.self_attn.k_proj.bias"),
    "linear": _without("model.layers.0.mlp.up_proj.weight"),
    "another": lambda tensors: tensors.update({"model.mtp.weight": torch.ones(4)}),
    "one bit": lambda tensors: tensors["model.norm.weight"].view(torch.int16)[3].bitwise_xor_(1),
    "another dtype": lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_the_step(fault: str, tmp_path: Path) -> None:
    source = save("qwen3", tmp_path / "source", attention_bias=True, tie_word_embeddings=False)
    dest = Path(shutil.copytree(source, tmp_path / "dest"))
    assert census.take(source, dest, "linears", {}).same == len(load_file(source / "model.safetensors"))
    tensors = load_file(dest / "model.safetensors")
    FAULTS[fault](tensors)
    save_file(tensors, dest / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError):
        census.take(source, dest, "linears", {})
