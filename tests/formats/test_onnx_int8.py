"""The int8 graph for several tokens: its weights against the first graph's, its rows against those of a token alone."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit import runtime
from optikit.formats.onnx_graph import OnnxGraph
from optikit.formats.onnx_int8 import nested
from optikit.models.onnx_files import VERIFY
from optikit.runtime.decoder import Window
from optikit.stage import Job
from optikit.stages.quantize import rtn
from tests.conftest import compile_onnx

TEXT = np.random.default_rng(0).integers(3, 259, 30)


@pytest.fixture(scope="module")
def compiled(tiny_llama, tmp_path_factory):
    """A model whose scales are nested, compiled with an int8 graph beside the first: the directory, and its facts."""
    work = tmp_path_factory.mktemp("nested")
    (work / "packed").mkdir()
    options = rtn.Options(group_size=32, scales="nested")
    rtn.run(options, Job(source=tiny_llama, dest=work / "packed", scratch=work / "scratch"))
    (work / "compiled").mkdir()
    dest = compile_onnx(work / "packed", work / "compiled", verify="int8")
    return dest, json.loads((work / "compiled" / "facts.json").read_text())


@pytest.fixture(scope="module")
def decoder(compiled):
    return runtime.load(compiled[0], threads=1)


def int8_weights(directory):
    """Return every weight of the int8 graph, (out_features, in_features), by a reader of its own."""
    model = onnx.load(str(directory / VERIFY))
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            name = node.input[1].removesuffix("/int8")
            yield name, (tensors[node.input[1]].astype(np.float32) * tensors[node.input[3]]).T


def test_weights_with_nested_scales_are_the_first_graphs_bit_for_bit(compiled):
    directory, facts = compiled
    graph = OnnxGraph(directory / "model.onnx")
    found = dict(int8_weights(directory))
    assert found.keys() == graph.products.keys()
    for name, product in graph.products.items():
        np.testing.assert_array_equal(found[name], graph.weight(product, 0, product.rows)[0])
    assert facts["verify_bit_equal"] == facts["verify_products"] == len(found)
    assert facts["verify_largest_steps"] == 0
    assert 0 < facts["verify_apart"] < 0.1


def test_other_weights_are_rounded_to_the_nearest_code(tiny_gptq, tmp_path):
    directory = compile_onnx(tiny_gptq, tmp_path, verify="int8")
    facts = json.loads((tmp_path / "facts.json").read_text())
    graph = OnnxGraph(directory / "model.onnx")
    assert facts["verify_bit_equal"] == 1  # the head, which is rounded for both graphs at once
    for name, found in int8_weights(directory):
        wanted = graph.weight(graph.products[name], 0, len(found))[0]
        step = np.abs(wanted).max(axis=1, keepdims=True) / 127
        assert (np.abs(found - wanted) <= 0.5001 * step).all()
    assert 0.4 < facts["verify_largest_steps"] <= 0.5001


def test_a_row_does_not_depend_on_its_neighbours(decoder):
    assert decoder.verifies_apart
    together = decoder.forward(TEXT, 0)
    for windows in ((1,) * len(TEXT), (2,) * (len(TEXT) // 2), (7, 1, 9, 13)):
        decoder.single("verify")
        at, rows = 0, []
        for m in windows:
            rows.append(decoder.forward(TEXT[at : at + m], at))
            at += m
        np.testing.assert_allclose(np.concatenate(rows), together, atol=2e-5)
        assert (np.concatenate(rows).argmax(1) == together.argmax(1)).all()
    decoder.single("own")
    batch = decoder.batched(2)
    (alone,) = batch.forward([Window(0, TEXT, 0, len(TEXT))])
    np.testing.assert_allclose(alone, together, atol=2e-5)


def test_products_of_a_row_are_the_same_whatever_stands_beside_it(decoder):
    prompt, first = TEXT[:20], TEXT[20:22]
    decoder.forward(prompt, 0, 1)
    pair = decoder.forward(first, 20)
    decoder.forward(prompt, 0, 1)
    many = decoder.forward(np.concatenate([first, TEXT[5:11]]), 20)
    np.testing.assert_array_equal(pair, many[:2])


def test_a_token_alone_is_run_by_the_graph_that_was_chosen(decoder):
    decoder.forward(TEXT[:10], 0, 1)
    rows = {}
    for path in ("own", "verify", "own"):
        decoder.single(path)
        rows[path] = decoder.forward(TEXT[10:11], 10)
    apart = np.abs(rows["own"] - rows["verify"])
    assert 0 < apart.max() < 0.2


def test_both_graphs_share_the_cache(decoder):
    """What the int8 graph wrote is read by the first one, and the other way round."""
    decoder.single("own")
    decoder.forward(TEXT[:9], 0, 1)
    one = decoder.forward(TEXT[9:10], 9)
    after = decoder.forward(TEXT[10:14], 10)
    decoder.forward(TEXT[:14], 0)
    again = decoder.forward(TEXT[10:14], 10)
    assert one.shape == (1, 260)
    assert np.abs(after - again).max() < 0.2
    assert (after.argmax(1) == again.argmax(1)).all()


@settings(deadline=None)
@given(
    base=st.integers(64, 127),
    exponent=st.integers(-14, -8),
    multiples=st.lists(st.integers(1, 15), min_size=1, max_size=9),
    signs=st.integers(0, 511),
)
def test_nested_scales_are_found_and_others_are_not(base, exponent, multiples, signs):
    sign = np.array([-1.0 if signs >> i & 1 else 1.0 for i in range(len(multiples))], np.float32)
    scales = (np.array(multiples, np.float32) * sign * np.float32(base * 2.0**exponent))[None]
    found = nested(scales, 15)
    assert found is not None
    np.testing.assert_array_equal(found[0][:, None] * found[1], scales)
    assert np.abs(found[1]).max() <= 15
    assert nested(np.array([[1.0, 1.0 + 2**-20]], np.float32), 15) is None
