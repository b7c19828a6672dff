"""Graphs for TensorRT: what is refused, what the real builder writes, and that a wrong graph is noticed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import onnx
import pytest

from optikit.errors import StageFailedError
from optikit.stage import Job
from optikit.stages.compile import _tensorrt_folder, tensorrt
from optikit.stages.compile._tensorrt_options import Options
from tests.stages.compile.conftest import target_row


def codes(facts, on="l4", **options):
    return [problem.code for problem in tensorrt.check(Options(**options), facts, target_row(on))]


def test_what_works_has_no_problems(facts):
    assert codes(facts) == codes(facts, precision="bf16") == codes(facts, on="a100-80") == []


@pytest.mark.parametrize(
    ("on", "options", "code"),
    [
        ("cpu", {}, "engine-not-on-target"),
        ("t4", {}, "gpu-too-old"),
    ],
)
def test_what_cannot_be(facts, on, options, code):
    assert codes(facts, on, **options) == [code]


def test_families_that_the_builder_does_not_know(facts):
    assert codes(replace(facts, model_type="opt")) == ["unknown-architecture"]


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def built(request, tiny_llama, tmp_path_factory):
    work = tmp_path_factory.mktemp(request.param)
    job = Job(source=tiny_llama, dest=work / "graph", scratch=work / "scratch", target=target_row("l4"))
    job.dest.mkdir()
    return request.param, job.dest, tensorrt.run(Options(precision=request.param), job)


def test_the_graph_is_valid_onnx_of_this_model_in_the_promised_types(built, facts):
    precision, directory, found = built
    assert (found["emitted"], found["checked"]) == (True, "onnx.checker")
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    inputs = {each.name for each in graph.input}
    assert {f"past_key_values.{layer}.{kind}" for layer in range(facts.layers) for kind in ("key", "value")} <= inputs
    operators = {node.op_type for node in graph.node}
    assert "MatMulNBits" not in operators  # TensorRT has no kernel for it
    assert {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision] in found["typed"]
    assert "NvTensorRtRtx" in (directory / "genai_config.json").read_text()
    readme = (directory / "README.md").read_text()
    assert "no engine was made" in readme
    assert "run.py" in readme


def test_without_the_gpu_s_libraries_the_script_says_which_one_is_missing(built):
    _, directory, _ = built
    done = subprocess.run([sys.executable, directory / "run.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "onnxruntime_ep_nv_tensorrt_rtx" in done.stderr


def test_a_graph_of_another_model_or_none_is_noticed(built, facts, tmp_path):
    _, directory, _ = built
    with pytest.raises(StageFailedError, match="caches for 3 layers"):
        _tensorrt_folder.checked(directory / "model.onnx", replace(facts, layers=3))
    broken = onnx.load(directory / "model.onnx", load_external_data=False)
    next(node for node in broken.graph.node if node.input).input[0] = "nowhere"
    for tensor in broken.graph.initializer:
        tensor.ClearField("external_data")
    onnx.save(broken, tmp_path / "model.onnx")
    with pytest.raises(StageFailedError, match="valid ONNX"):
        _tensorrt_folder.checked(tmp_path / "model.onnx", facts)
