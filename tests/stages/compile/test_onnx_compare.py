"""A graph that computes something else than its model is found, whatever the cause; a right one passes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from optikit.errors import IntegrityError
from optikit.models.reader import read
from optikit.stage import Job
from optikit.stages.compile import _logits, _onnx_compare, onnxruntime
from tests.stages.compile.conftest import tampered

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def compare(source, directory):
    return _onnx_compare.compare(source, directory, read(source), window=512, threads=1)


@pytest.fixture
def source(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "source")


def configure(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("model", "compiled"), [("tiny_llama", "tiny_onnx"), ("tiny_gptq", "tiny_onnx_int4")])
def test_a_right_graph_is_as_near_as_float32(model, compiled, request):
    found = compare(request.getfixturevalue(model), request.getfixturevalue(compiled))
    assert found["logits_apart"] < 1e-5
    assert (found["logits_compared"], found["rotary_positions_compared"]) == (256, 512)
    assert found.get("activation_rounding_apart", 0) < 0.1
    assert ("activation_rounding_apart" in found) is (compiled == "tiny_onnx_int4")


@pytest.mark.parametrize("parameters", [LINEAR, YARN, {"rope_type": "default", "rope_theta": 20000.0}])
def test_a_graph_that_rotates_otherwise(parameters, source, tiny_onnx):
    configure(source, rope_parameters=parameters)
    with pytest.raises(IntegrityError, match=r"rotates otherwise than the model: cos_cache has .* transformers"):
        compare(source, tiny_onnx)


def test_one_angle_far_away(tiny_llama, tiny_onnx, tmp_path):
    def turn(values):
        values[400 * 8 + 3] += 0.01

    with pytest.raises(IntegrityError, match=r"sin_cache has .* at position 400, channel 3"):
        compare(tiny_llama, tampered(tiny_onnx, tmp_path / "bad", "sin_cache", turn))


@pytest.mark.parametrize("compiled", ["tiny_onnx", "tiny_onnx_int4"])
def test_a_norm_that_the_weights_do_not_show(compiled, request, tmp_path):
    def grow(values):
        values *= 1.05

    name = "model.layers.1.post_attention_layernorm.weight"
    bad = tampered(request.getfixturevalue(compiled), tmp_path / "bad", name, grow)
    model = request.getfixturevalue({"tiny_onnx": "tiny_llama", "tiny_onnx_int4": "tiny_gptq"}[compiled])
    with pytest.raises(IntegrityError, match="computes something else than the model: on 256 tokens"):
        compare(model, bad)


def test_a_setting_that_changes_the_arithmetic(source, tiny_onnx):
    configure(source, hidden_act="gelu")
    with pytest.raises(IntegrityError, match="computes something else"):
        compare(source, tiny_onnx)


def test_a_window_that_a_graph_leaves_out_bounds_the_text(tiny_llama):
    assert _logits.probe(read(tiny_llama), 40).shape == (40,)
    assert torch.equal(_logits.probe(read(tiny_llama), 40), _logits.probe(read(tiny_llama), 10**6)[:40])


def test_the_builder_ignores_a_scaling_and_the_stage_fails(source, tmp_path):
    configure(source, rope_parameters=LINEAR)
    (dest := tmp_path / "dest").mkdir()
    job = Job(source=source, dest=dest, scratch=tmp_path / "scratch")
    with pytest.raises(IntegrityError, match="rotates otherwise"):
        onnxruntime.run(onnxruntime.Options(), job)
