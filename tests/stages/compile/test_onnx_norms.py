"""Norms that are offset: what is in a graph is the sum in float32, whatever dtype the checkpoint has."""

from __future__ import annotations

import numpy as np
import pytest

from optikit.errors import IntegrityError
from optikit.formats.checkpoint import Checkpoint
from optikit.formats.onnx_graph import OnnxGraph
from optikit.models.reader import read
from optikit.stage import Job
from optikit.stages.compile import _onnx_norms, onnxruntime
from tests.families import save


def test_a_graph_of_gemma_2_whose_norms_are_far_from_zero(tmp_path):
    source = save("gemma2", tmp_path / "source")
    (dest := tmp_path / "dest").mkdir()
    found = onnxruntime.run(onnxruntime.Options(), Job(source=source, dest=dest, scratch=tmp_path / "scratch"))
    assert found["logits_apart"] < 1e-5  # 0.005 with sums in bfloat16
    graph, stored = OnnxGraph(dest / "model.onnx"), Checkpoint(source)
    last = graph.read("model.layers.2.final_norm_layernorm.weight")
    wanted = 1 + stored.read("model.norm.weight").float().numpy()
    assert np.array_equal(last, wanted)
    assert np.abs(wanted - 1).max() > 0.3
    again = graph.read("model.layers.1.pre_feedforward_layernorm.weight")
    assert np.array_equal(again, 1 + stored.read("model.layers.1.pre_feedforward_layernorm.weight").float().numpy())
    with pytest.raises(IntegrityError, match=r"no tensor model\.layers\.9"):
        graph.write("model.layers.9.input_layernorm.weight", wanted)
    with pytest.raises(IntegrityError, match=r"no tensor .* \(3,\)"):
        graph.write("model.layers.0.input_layernorm.weight", wanted[:3])


def test_a_family_without_an_offset_is_left_alone(tiny_llama, tiny_onnx):
    before = (tiny_onnx / "model.onnx.data").read_bytes()
    assert _onnx_norms.mend(tiny_llama, tiny_onnx / "model.onnx", read(tiny_llama)) == 0
    assert (tiny_onnx / "model.onnx.data").read_bytes() == before
