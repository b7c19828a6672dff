"""What was written is re-opened and held to what was promised: every kind of lie is caught, and named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit import stages
from optikit.algorithms.grid import Grid
from optikit.calibration.expert_proof import Tally
from optikit.calibration.method import Walked
from optikit.calibration.verify import verify_rounded
from optikit.calibration.write_checkpoint import grid_layout
from optikit.errors import StageFailedError
from optikit.stage import Job

GRID = Grid(bits=4, group_size=32, sym=True)
PACKING = grid_layout("gptq", GRID, {}).packing
LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def written(tiny_llama, tmp_path_factory):
    place = tmp_path_factory.mktemp("written")
    for name in ("dest", "scratch"):
        (place / name).mkdir()
    stage = stages.load("quantize", "rtn")
    stage.run(stage.Options(group_size=32), Job(source=tiny_llama, dest=place / "dest", scratch=place / "scratch"))
    return place / "dest"


def walked(directory: Path) -> Walked:
    names = tuple(name.rpartition(".")[0] for name in load_file(directory / "model.safetensors") if ".qweight" in name)
    return Walked(entries={}, linears=names, ignore=lambda _: False)


def test_a_true_result_passes(tiny_llama, written):
    facts = verify_rounded(tiny_llama, written, PACKING, walked(written))
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
    promised = walked(written)
    state = load_file(written / "model.safetensors")
    LIES[lie](state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((written / "config.json").read_bytes())
    with pytest.raises(StageFailedError, match=lie) as error:
        verify_rounded(tiny_llama, tmp_path, PACKING, promised)
    assert LINEAR in error.value.message or lie in ("nothing asked for it", "should be untouched")


def test_lost_sparsity_is_caught(tiny_llama, written, tmp_path):
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    state = load_file(tiny_llama / "model.safetensors")
    state[f"{LINEAR}.weight"][:, ::2] = 0
    save_file(state, pruned / "model.safetensors", {"format": "pt"})
    (pruned / "config.json").write_text(json.dumps(json.loads((tiny_llama / "config.json").read_text())))
    with pytest.raises(StageFailedError, match=f"{LINEAR} was pruned and has lost zeros"):
        verify_rounded(pruned, written, PACKING, walked(written))


def test_codes_that_are_all_the_same_are_caught(tiny_llama, written, tmp_path):
    """Near enough to a weight that hardly varies, and yet nothing was rounded: all it says is one number."""
    source, dest = tmp_path / "source", tmp_path / "dest"
    for place, model in ((source, tiny_llama), (dest, written)):
        place.mkdir()
        (place / "config.json").write_bytes((model / "config.json").read_bytes())
    state, packed = load_file(tiny_llama / "model.safetensors"), load_file(written / "model.safetensors")
    weight = state[f"{LINEAR}.weight"]
    weight.fill_(0.7)[0, 0] = 0.69
    save_file(state, source / "model.safetensors", {"format": "pt"})
    for linear_state, varied in ((packed, False), ({**packed}, True)):
        codes, groups = torch.full(weight.shape, 15, dtype=torch.uint8), (len(weight), weight.shape[1] // 32)
        codes[0, 0] -= int(varied)
        new = PACKING.pack(codes, torch.full(groups, 0.1).half(), torch.full(groups, 8, dtype=torch.uint8))
        linear_state.update({f"{LINEAR}.{suffix}": tensor for suffix, tensor in new.items()})
        save_file(linear_state, dest / "model.safetensors", {"format": "pt"})
        if varied:
            verify_rounded(source, dest, PACKING, walked(written))
            continue
        with pytest.raises(StageFailedError, match=f"all codes of {LINEAR} are 15"):
            verify_rounded(source, dest, PACKING, walked(written))


def test_a_tally_of_strips_is_that_of_the_whole():
    codes, scales = torch.randint(0, 16, (300, 64), dtype=torch.uint8), torch.rand(300, 2) - 0.5
    tally = Tally()
    for start in (0, 128, 256):
        tally.add(codes[start : start + 128], scales[start : start + 128])
    shares = [float((codes == code).double().mean()) for code in range(16)]
    assert tally.entropy == pytest.approx(-sum(share * math.log2(share) for share in shares))
    assert tally.scales == (float(scales.abs().min()), float(scales.abs().max()))
    assert tally.only is None
    assert (Tally().entropy, Tally().scales, Tally().only) == (None, None, None)
