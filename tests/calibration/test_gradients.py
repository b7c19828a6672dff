"""The block-by-block backward pass against torch's own on the whole model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from optikit.algorithms import width
from optikit.calibration.empty_model import EmptyModel
from optikit.calibration.gradients import gradients
from optikit.calibration.methods.width import Coupling, _parts
from optikit.calibration.source_model import SourceModel
from optikit.formats.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def both(tiny_llama, tmp_path_factory):
    """Gradients of every linear: block by block, and of the whole model at once."""
    windows = torch.randint(3, 260, (3, 24), generator=torch.Generator().manual_seed(0))
    source = SourceModel(Checkpoint(tiny_llama))
    blank = EmptyModel(source, dtype=torch.float32, device="cpu")
    scratch = tmp_path_factory.mktemp("gradients")
    ours, importance = {}, {}
    coupling = Coupling(
        reader="mlp.down_proj", makers=(("mlp.gate_proj", 1), ("mlp.up_proj", 1)), size=1, units=128, keep=64
    )
    for index, block in gradients(blank, windows, scratch):
        for name in source.row.linears:
            ours[f"model.layers.{index}.{name}"] = block.get_submodule(name).weight.grad.clone()
        importance[index] = width.taylor(_parts(block, coupling, transposed=False))
    assert not list(scratch.iterdir())
    assert all(parameter.is_meta for block in blank.blocks for parameter in block.parameters())
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for window in windows:
        model(input_ids=window[None], labels=window[None]).loss.backward()
    return ours, importance, model


def test_gradients_are_those_of_the_whole_model(both):
    ours, _, model = both
    assert len(ours) == 14
    for name, gradient in ours.items():
        whole = model.get_submodule(name).weight.grad
        assert torch.allclose(gradient, whole, rtol=1e-3, atol=1e-6 + 1e-4 * whole.abs().max())


@torch.no_grad()
def test_importance_sums_all_coupled_matrices(both):
    _, importance, model = both
    for index, found in importance.items():
        mlp = model.model.layers[index].mlp
        slow = [
            sum(
                float((row.weight[j] * row.weight.grad[j]).abs().sum()) for row in (mlp.gate_proj, mlp.up_proj)
            ) + float((mlp.down_proj.weight[:, j] * mlp.down_proj.weight.grad[:, j]).abs().sum())
            for j in range(128)
        ]  # fmt: skip
        assert found.tolist() == pytest.approx(slow, rel=1e-2)
