"""Unpacking MatMulNBits against onnxruntime itself: a product with the identity matrix returns the weight it sees."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from optikit.errors import IntegrityError
from optikit.formats.onnx_graph import OnnxGraph, unpack_codes


def write_graph(path, *, rows, columns, bits, block, zeros, seed):
    """Save one product with random codes, scales and zero points, its weights beside it."""
    draw = np.random.default_rng(seed)
    blocks = -(-columns // block)
    tensors = {
        "b": draw.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        "s": draw.normal(0, 1, (rows * blocks)).astype(np.float32),
    }
    if zeros:
        tensors["z"] = draw.integers(0, 256, rows * -(-blocks * bits // 8), np.uint8)
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 1}
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], "/lm_head/MatMulNBits", domain="com.microsoft", **attributes
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])],
        [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, str(path), save_as_external_data=True, location="w.data", size_threshold=0)


def seen_by_onnxruntime(path, columns):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0].T


@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    ragged=st.integers(0, 15),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64]),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_weight_is_the_one_that_onnxruntime_multiplies_with(
    tmp_path_factory, rows, blocks, ragged, bits, block, zeros, seed
):
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    columns = blocks * block - ragged
    write_graph(path, rows=rows, columns=columns, bits=bits, block=block, zeros=zeros, seed=seed)
    graph = OnnxGraph(path)
    product = graph.products["/lm_head/MatMul"]
    weight, steps = graph.weight(product, 0, rows)
    np.testing.assert_array_equal(weight, seen_by_onnxruntime(path, columns))
    for start in range(rows):
        part, _ = graph.weight(product, start, start + 1)
        np.testing.assert_array_equal(part[0], weight[start])
    assert steps.shape == weight.shape
    assert (steps > 0).all()


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40).filter(lambda codes: len(codes) % 2 == 0))
def test_codes_are_unpacked_lowest_bits_first(codes):
    packed = np.array([low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)], np.uint8)
    assert unpack_codes(packed, 4).tolist() == codes


def test_data_that_ends_early(tmp_path):
    write_graph(tmp_path / "model.onnx", rows=4, columns=64, bits=4, block=32, zeros=True, seed=0)
    data = tmp_path / "w.data"
    data.write_bytes(data.read_bytes()[:50])
    graph = OnnxGraph(tmp_path / "model.onnx")
    with pytest.raises(IntegrityError, match="ends before tensor"):
        graph.weight(graph.products["/lm_head/MatMul"], 0, 4)


def test_no_graph(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(IntegrityError, match="not an ONNX file"):
        OnnxGraph(tmp_path / "model.onnx")
