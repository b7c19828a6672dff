"""The embedding of a compiled graph: tied, or small; held to the source's weights and to onnxruntime's own lookup."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from optikit.errors import IntegrityError, StageFailedError
from optikit.formats.onnx_graph import EMBEDDING, OnnxGraph
from optikit.models.reader import read
from optikit.stages.compile import _onnx_compare, _onnx_embedding, _onnx_verify
from optikit.stages.compile import onnxruntime as stage
from optikit.stages.compile.onnxruntime import Options
from optikit.targets import Target
from tests.conftest import compile_onnx
from tests.stages.compile.conftest import tampered

CPU = Target(name="cpu", device="cpu", engines=("onnxruntime",))


@pytest.fixture(scope="module")
def untied(tiny_gptq, tmp_path_factory):
    """A packed model whose head is what the tied one has, and whose embedding is another matrix."""
    dest = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(tiny_gptq, dest)
    tensors = load_file(dest / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table
    tensors["model.embed_tokens.weight"] = table.flip(0).contiguous()
    save_file(tensors, dest / "model.safetensors", {"format": "pt"})
    config = json.loads((dest / "config.json").read_text()) | {"tie_word_embeddings": False}
    (dest / "config.json").write_text(json.dumps(config))
    return dest


@pytest.fixture(scope="module")
def floats(tiny_gptq, tmp_path_factory):
    """A graph with a float32 table beside the head of the same weights, as the builder writes it."""
    return compile_onnx(tiny_gptq, tmp_path_factory.mktemp("floats"), embedding="float32")


def compared(source, directory):
    found = _onnx_verify.compare(source, directory, read(source), exact=True)
    return found | _onnx_compare.compare(source, directory, read(source), window=128, threads=1)


@pytest.mark.parametrize(("bits", "group_size", "least", "most"), [(8, 32, 0.4, 0.6), (4, 16, 0.6, 2.5)])
def test_a_small_table_is_the_source_s_within_its_rounding(tiny_gptq, floats, tmp_path, bits, group_size, least, most):
    shutil.copytree(floats, dest := tmp_path / "dest")
    table = load_file(tiny_gptq / "model.safetensors")["model.embed_tokens.weight"]
    _onnx_embedding.round_table(dest / "model.onnx", table, bits, group_size, tmp_path)
    found = compared(tiny_gptq, dest)
    assert found["embedding"] == f"int{bits}"
    assert least < found["embedding_largest_steps"] < most
    assert found["logits_apart"] < 1e-5
    facts, name = read(tiny_gptq), f"int{bits}"
    planned = stage.after(Options(embedding=name, block_size=group_size), facts).weight_bytes
    planned += 4 * 2 * facts.vocab * (64 // 32 - 64 // group_size) // 2  # the head's groups are still of 32
    assert (dest / "model.onnx.data").stat().st_size == planned

    def swap(values):
        first, second = values[:group_size].copy(), values[group_size : 2 * group_size].copy()
        values[:group_size], values[group_size : 2 * group_size] = second, first

    bad = tampered(dest, tmp_path / "bad", f"{EMBEDDING}weight", swap)
    with pytest.raises(StageFailedError, match=r"embed_tokens\.weight: \d+ of 16640 weights in the graph differ"):
        compared(tiny_gptq, bad)


def test_floats_are_tied_in_a_graph_that_has_both(tiny_gptq, tmp_path):
    compiled = compile_onnx(tiny_gptq, tmp_path, head="float32")
    found = json.loads((tmp_path / "facts.json").read_text())
    assert (found["embedding"], found["embedding_largest_steps"], found["head"]) == ("the head's", 0, "float32")
    size = (compiled / "model.onnx.data").stat().st_size
    assert size == stage.after(Options(head="float32"), read(tiny_gptq)).weight_bytes


def test_codes_are_tied_and_only_where_the_model_does(tiny_gptq, untied, floats, tmp_path):
    shutil.copytree(floats, dest := tmp_path / "dest")
    _onnx_embedding.tie(dest / "model.onnx", tmp_path)
    found = compared(tiny_gptq, dest)
    assert (found["embedding"], found["head"]) == ("the head's", "int8")
    assert found["logits_apart"] < 1e-5
    with pytest.raises(StageFailedError, match=r"embed_tokens\.weight: \d+ of 16640 weights in the graph differ"):
        compared(untied, dest)
    with pytest.raises(StageFailedError, match="no table of tokens"):
        _onnx_embedding.tie(dest / "model.onnx", tmp_path)


def test_what_planning_says(tiny_llama, tiny_gptq, untied):
    dense, packed, apart = read(tiny_llama), read(tiny_gptq), read(untied)
    assert stage.table(Options(), dense) == stage.table(Options(), packed) == "head"
    assert stage.table(Options(), apart) == "int8"
    assert stage.table(Options(), replace(dense, tied=False)) == "float32"
    assert stage.table(Options(embedding="int4"), packed) == "int4"
    assert stage.table(Options(precision="int8"), dense) == "head"
    assert "shared_embeddings=false" in stage.builder_options(Options(precision="int8"), dense)
    assert "shared_embeddings=false" in stage.builder_options(Options(embedding="int4"), packed)
    assert "shared_embeddings=false" not in stage.builder_options(Options(), packed)
    (problem,) = stage.check(Options(embedding="int4"), replace(apart, hidden=72), CPU)
    assert (problem.code, problem.loc) == ("embedding-width", ("embedding",))
    assert stage.table(Options(), replace(apart, hidden=72)) == "float32"


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 99),
)
def test_onnxruntime_looks_up_what_was_rounded(tmp_path_factory, rows, groups, bits, size, seed):
    table = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed))
    codes, scales = _onnx_embedding.rounded(table, bits, size)
    path = tmp_path_factory.mktemp("table") / "model.onnx"
    settings_ = {"bits": bits, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
    node = helper.make_node(
        "GatherBlockQuantized", ["w", "t", "s"], ["y"], f"{EMBEDDING}lookup", domain="com.microsoft", **settings_
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("t", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(codes, "w"), onnx.numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, str(path), save_as_external_data=True, location="w.data", size_threshold=0)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (seen,) = session.run(None, {"t": np.arange(rows)})
    read_back = OnnxGraph(path)
    weight, steps = read_back.weight(read_back.find(EMBEDDING), 0, rows)
    np.testing.assert_array_equal(seen, weight)
    assert (np.abs(weight - table.numpy()) <= (0.6 if bits == 8 else 2.5) * steps).all()
    with pytest.raises(IntegrityError, match="no weight at"):
        read_back.find("/lm_head/MatMul")
