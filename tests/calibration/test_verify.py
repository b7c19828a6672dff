"""What was written is re-opened and held to what was promised: every kind of lie is caught, and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit import stages
from optikit.algorithms.grid import Grid
from optikit.calibration.verify import verify_packed
from optikit.errors import StageFailedError
from optikit.stage import Job

GRID = Grid(bits=4, group_size=32, sym=True)
LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def written(tiny_llama, tmp_path_factory):
    place = tmp_path_factory.mktemp("written")
    for name in ("dest", "scratch"):
        (place / name).mkdir()
    stage = stages.load("quantize", "rtn")
    stage.run(stage.Options(group_size=32), Job(source=tiny_llama, dest=place / "dest", scratch=place / "scratch"))
    return place / "dest"


def linears(directory: Path) -> tuple[str, ...]:
    return tuple(name.rpartition(".")[0] for name in load_file(directory / "model.safetensors") if ".qweight" in name)


def test_a_true_result_passes(tiny_llama, written):
    facts = verify_packed(tiny_llama, written, linears(written), GRID, {})
    assert facts["linears_packed"] == 14
    assert facts["packed_share"] == 1.0
    assert 4.5 < facts["bits_per_weight"] < 6


def truncated(state):
    state[f"{LINEAR}.qweight"] = state[f"{LINEAR}.qweight"][:-1].contiguous()
    state[f"{LINEAR}.g_idx"] = state[f"{LINEAR}.g_idx"][:-8].contiguous()


LIES = {
    "was not written": lambda s: s.pop(f"{LINEAR}.scales"),
    "nothing asked for it": lambda s: s.update({"extra": torch.ones(1)}),
    "should be untouched": lambda s: s["model.norm.weight"].add_(0.5),
    "has scales that are zero": lambda s: s[f"{LINEAR}.scales"][0, 0].zero_(),
    "dequantizes to NaN": lambda s: s[f"{LINEAR}.scales"][0, 0].fill_(float("nan")),
    "zero points that its grid": lambda s: s[f"{LINEAR}.qzeros"].add_(1),
    "is off by": lambda s: s[f"{LINEAR}.qweight"].copy_(s[f"{LINEAR}.qweight"].flip(0)),
    r"has codes \(128, 56\)": truncated,
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_caught_and_named(tiny_llama, written, tmp_path, lie):
    promised = linears(written)
    state = load_file(written / "model.safetensors")
    LIES[lie](state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((written / "config.json").read_bytes())
    with pytest.raises(StageFailedError, match=lie) as error:
        verify_packed(tiny_llama, tmp_path, promised, GRID, {})
    assert LINEAR in error.value.message or lie in ("nothing asked for it", "should be untouched")


def test_lost_sparsity_is_caught(tiny_llama, written, tmp_path):
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    state = load_file(tiny_llama / "model.safetensors")
    state[f"{LINEAR}.weight"][:, ::2] = 0
    save_file(state, pruned / "model.safetensors", {"format": "pt"})
    (pruned / "config.json").write_text(json.dumps(json.loads((tiny_llama / "config.json").read_text())))
    with pytest.raises(StageFailedError, match=f"{LINEAR} was pruned and has lost zeros"):
        verify_packed(pruned, written, linears(written), GRID, {})
