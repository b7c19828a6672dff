"""The OpenVINO decoder on a small graph with a state: against numpy, against itself, and against damage."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from optikit import runtime
from optikit.errors import InputMissingError, IntegrityError, UsageError

openvino = pytest.importorskip("openvino")

VOCAB, WIDTH, CONTEXT = 50, 8, 600
CLOSE = 0.1
"""On a processor that has bf16 arithmetic, OpenVINO uses it."""
PROMPT = np.random.default_rng(1).integers(0, VOCAB, 12)


def weights():
    random = np.random.default_rng(0)
    table = random.integers(-1, 2, (VOCAB, WIDTH)) / 8  # their sums are exact in bf16, however long the text
    return table.astype(np.float32), random.normal(size=(VOCAB, WIDTH)).astype(np.float32)


def save(directory, *, convert=False):
    """A causal model whose cache is its graph's state: every position reads tanh of the sum of what came before."""
    from openvino import opset13 as ops

    table, head = weights()
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = [ops.parameter([-1, -1], np.int64, name=name) for name in names]
    inputs.append(ops.parameter([-1], np.int32, name="beam_idx"))
    embedded = ops.unsqueeze(ops.gather(ops.constant(table), inputs[0], ops.constant(0)), ops.constant(1))
    info = openvino.op.util.VariableInfo()
    info.variable_id, info.data_type = "past", openvino.Type.f32
    info.data_shape = openvino.PartialShape([-1, 1, -1, WIDTH])
    variable = openvino.op.util.Variable(info)
    empty = ops.constant(np.zeros((1, 1, 0, WIDTH), np.float32))
    full = ops.concat([ops.read_value(empty, variable), embedded], 2)
    kept = ops.assign(full, variable)
    sums = ops.tanh(ops.cum_sum(full, ops.constant(2)))
    length = ops.gather(ops.shape_of(inputs[0]), ops.constant([1]), ops.constant(0))
    total = ops.gather(ops.shape_of(full), ops.constant([2]), ops.constant(0))
    big, one, two = (ops.constant(np.array([value], np.int64)) for value in (2**40, 1, 2))
    new = ops.squeeze(ops.slice(sums, ops.subtract(total, length), big, one, two), ops.constant(1))
    out = ops.matmul(new, ops.constant(head), transpose_a=False, transpose_b=True)
    result = ops.result(ops.convert(out, "f32") if convert else out)
    result.output(0).get_tensor().set_names({"logits"})
    model = openvino.Model([result], [kept], inputs, [variable], "tiny")
    for each in inputs:
        each.output(0).get_tensor().set_names({each.get_friendly_name()})
    openvino.save_model(model, directory / "openvino_model.xml", compress_to_fp16=False)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": CONTEXT}))
    return directory


def expected(tokens):
    table, head = weights()
    return np.tanh(table[tokens].cumsum(0)) @ head.T


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save(tmp_path_factory.mktemp("openvino"))


@pytest.fixture(scope="module")
def decoder(directory):
    return runtime.load(directory, threads=1)


def test_what_was_loaded_is_read_back(decoder):
    assert (decoder.runtime, decoder.dtype, decoder.vocab) == ("openvino", "float32", VOCAB)
    assert (decoder.max_tokens, decoder.threads) == (CONTEXT, 1)


@pytest.mark.parametrize("rows", [1, 5, None])
def test_logits_are_the_model_s(decoder, rows):
    found = decoder.forward(PROMPT, 0, rows)
    assert found.shape == (rows or len(PROMPT), VOCAB)
    assert np.allclose(found, expected(PROMPT)[-(rows or len(PROMPT)) :], atol=CLOSE)


def test_a_long_text_in_chunks_is_the_same_text(decoder):
    tokens = np.random.default_rng(2).integers(0, VOCAB, 530)
    assert np.allclose(decoder.forward(tokens, 0, 300), expected(tokens)[-300:], atol=CLOSE)


def test_going_back_forgets_what_came_after(decoder):
    decoder.forward(PROMPT, 0, 1)
    other = np.array([7, 8, 9])
    found = decoder.forward(other, 5)
    assert np.allclose(found, expected(np.concatenate([PROMPT[:5], other]))[-3:], atol=CLOSE)
    again = decoder.forward(PROMPT, 0)
    assert np.allclose(again, expected(PROMPT), atol=CLOSE)


def test_greedy_takes_the_likeliest_token_every_time(decoder):
    tokens = list(PROMPT)
    for found in decoder.greedy(PROMPT, 6):
        rows = expected(np.array(tokens))[-1]
        assert rows[found] > rows.max() - CLOSE
        tokens.append(found)
    assert len(tokens) == len(PROMPT) + 6


def test_calls_that_cannot_be_are_refused(directory, decoder):
    with pytest.raises(UsageError, match="vocabulary"):
        decoder.forward(np.array([VOCAB]), 0)
    with pytest.raises(UsageError, match="don't fit"):
        next(decoder.greedy(PROMPT, CONTEXT))
    with pytest.raises(UsageError, match="not int8"):
        runtime.load(directory, dtype="int8")
    with pytest.raises(UsageError, match="context of 600"):
        runtime.load(directory, max_tokens=601)


def test_missing_and_damaged_files_are_named(directory, tmp_path):
    with pytest.raises(InputMissingError):
        runtime.load(tmp_path, runtime="openvino")
    (tmp_path / "openvino_model.xml").write_bytes((directory / "openvino_model.xml").read_bytes()[:500])
    with pytest.raises(InputMissingError, match="config"):
        runtime.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match="max_position_embeddings"):
        runtime.load(tmp_path)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 10}')
    with pytest.raises(IntegrityError, match="can't load"):
        runtime.load(tmp_path)


def test_a_missing_library_is_said_with_a_fix(directory):
    code = (
        "import sys, pathlib; sys.modules['openvino'] = None\n"
        "from optikit import runtime; from optikit.errors import UnavailableError\n"
        "try: runtime.load(pathlib.Path(sys.argv[1]))\n"
        "except UnavailableError as error: print(error.fix, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "pip install 'optikit[openvino]' False"
