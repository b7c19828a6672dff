"""The raw onnxruntime decoder against transformers, against onnxruntime-genai, against itself, and against damage."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest

from optikit import runtime
from optikit.errors import InputMissingError, IntegrityError, UsageError
from optikit.runtime.decoders import onnxruntime

PROMPT = np.random.default_rng(0).integers(3, 259, 40)


@pytest.fixture(scope="module")
def reference(tiny_llama):
    return runtime.load(tiny_llama, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def decoder(tiny_onnx):
    return runtime.load(tiny_onnx, threads=1)


@pytest.fixture(scope="module")
def int4(tiny_onnx_int4):
    return runtime.load(tiny_onnx_int4, threads=1)


def damaged(source, dest):
    shutil.copytree(source, dest)
    return dest


def test_says_what_it_is(decoder, int4):
    assert (decoder.runtime, decoder.dtype, decoder.threads, decoder.vocab) == ("onnxruntime", "float32", 1, 260)
    assert (int4.dtype, int4.max_tokens) == ("int4", 512)


def test_logits_are_those_of_transformers(decoder, reference):
    np.testing.assert_allclose(decoder.forward(PROMPT, 0), reference.forward(PROMPT, 0), atol=2e-6)


def test_int4_logits_differ_from_the_unpacked_model_only_by_rounded_activations(int4, tiny_gptq):
    unpacked = runtime.load(tiny_gptq, dtype="float32", threads=1).forward(PROMPT, 0)
    apart = np.abs(int4.forward(PROMPT, 0) - unpacked)
    assert 0 < apart.max() < 0.05 < np.abs(unpacked).max()


@pytest.mark.parametrize(("chunk", "rows"), [(256, None), (256, 1), (16, None), (16, 20), (16, 3)])
def test_states_are_those_that_the_head_reads(decoder, reference, monkeypatch, chunk, rows):
    monkeypatch.setattr(onnxruntime, "CHUNK", chunk)
    reference.forward(PROMPT, 0)
    wanted = np.stack([reference.hidden(row) for row in range(len(PROMPT))])[-(rows or len(PROMPT)) :]
    decoder.forward(PROMPT, 0, rows)
    found = np.stack([decoder.hidden(row) for row in range(len(wanted))])
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert decoder.width == reference.width == found.shape[1]


def test_rolling_back_forgets_what_came_after(tiny_onnx_int4, int4):
    other = np.random.default_rng(1).integers(3, 259, 60)
    int4.forward(other, 0)
    int4.forward(PROMPT[:10], 0)
    again = int4.forward(PROMPT[10:], 10)
    fresh = runtime.load(tiny_onnx_int4, threads=1).forward(PROMPT, 0)
    np.testing.assert_array_equal(again, fresh[10:])


def test_one_token_at_a_time_is_the_same_in_float32(decoder):
    whole = decoder.forward(PROMPT, 0)
    single = [decoder.forward(PROMPT[i : i + 1], i)[0] for i in range(len(PROMPT))]
    np.testing.assert_allclose(single, whole, atol=2e-6)


def test_a_long_prompt_goes_through_in_chunks(decoder, reference, monkeypatch):
    monkeypatch.setattr(onnxruntime, "CHUNK", 7)
    np.testing.assert_allclose(decoder.forward(PROMPT, 0), reference.forward(PROMPT, 0), atol=2e-6)
    in_chunks = list(decoder.greedy(PROMPT, 5))
    monkeypatch.undo()
    assert in_chunks == list(decoder.greedy(PROMPT, 5))


def test_logits_stay_what_they_were(decoder):
    first = decoder.forward(PROMPT[:1], 0)
    kept = first.copy()
    decoder.forward(PROMPT[5:6], 0)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("new_tokens", [1, 2, 30])
def test_greedy_is_the_argmax_of_forward(decoder, new_tokens):
    tokens = list(decoder.greedy(PROMPT, new_tokens))
    assert len(tokens) == new_tokens
    logits = decoder.forward(np.array([*PROMPT, *tokens[:-1]]), 0)
    assert tokens == logits[len(PROMPT) - 1 :].argmax(axis=1).tolist()


@pytest.mark.parametrize("compiled", ["tiny_onnx", "tiny_onnx_int4"])
def test_greedy_is_what_onnxruntime_genai_decodes(compiled, request):
    import onnxruntime_genai as genai

    directory = request.getfixturevalue(compiled)
    settings = genai.GeneratorParams(model := genai.Model(str(directory)))
    settings.set_search_options(do_sample=False, min_length=len(PROMPT) + 24, max_length=len(PROMPT) + 24)
    generator = genai.Generator(model, settings)
    generator.append_tokens(PROMPT.astype(np.int32))
    theirs = []
    while not generator.is_done():
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert list(runtime.load(directory, threads=1).greedy(PROMPT, 24)) == theirs


def test_no_input_grows_with_the_text(decoder):
    assert "attention_mask" not in {each.name for each in decoder._session.get_inputs()}
    operators = {node.op_type for node in onnx.load(str(decoder._layout.graph), load_external_data=False).graph.node}
    assert {"ReduceSum", "Shape"} <= operators, "the file on disk counts its mask; only the loaded graph doesn't"


def test_a_mask_that_others_read_is_still_passed(tiny_onnx, decoder, tmp_path):
    where = damaged(tiny_onnx, tmp_path / "masked")
    model = onnx.load(str(where / "model.onnx"), load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["attention_mask"], ["seen"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("seen", onnx.TensorProto.INT64, []))
    onnx.save(model, str(where / "model.onnx"))
    masked = runtime.load(where, threads=1)
    assert "attention_mask" in {each.name for each in masked._session.get_inputs()}
    np.testing.assert_array_equal(masked.forward(PROMPT, 0), decoder.forward(PROMPT, 0))
    assert list(masked.greedy(PROMPT, 9)) == list(decoder.greedy(PROMPT, 9))


def test_a_sequence_may_fill_the_cache_and_no_more(tiny_onnx):
    small = runtime.load(tiny_onnx, threads=1, max_tokens=48)
    assert len(list(small.greedy(PROMPT, 8))) == 8
    with pytest.raises(UsageError, match="49 tokens don't fit: this decoder holds 48"):
        list(small.greedy(PROMPT, 9))
    with pytest.raises(UsageError, match="holds 48"):
        small.forward(np.zeros(49, np.int64), 0)


@pytest.mark.parametrize(
    ("tokens", "position", "told"),
    [
        ([], 0, "a row of tokens"),
        ([[1, 2]], 0, "a row of tokens"),
        ([5], 7, "isn't within the 0 tokens"),
        ([5], -1, "isn't within"),
        ([260], 0, "token 260 is outside the vocabulary of 260"),
        ([-1], 0, "token -1 is outside"),
    ],
)
def test_calls_that_make_no_sense_are_refused(tiny_onnx, tokens, position, told):
    with pytest.raises(UsageError, match=told):
        runtime.load(tiny_onnx, threads=1).forward(np.array(tokens, np.int64), position)


def test_no_cache_beyond_the_context(tiny_onnx):
    with pytest.raises(UsageError, match="513 is beyond the model's context of 512"):
        runtime.load(tiny_onnx, max_tokens=513)


def test_a_dtype_is_not_made_up(tiny_onnx_int4):
    with pytest.raises(UsageError, match="holds int4 weights, not bfloat16"):
        runtime.load(tiny_onnx_int4, dtype="bfloat16")


def test_a_graph_that_is_no_graph(tiny_onnx, tmp_path):
    directory = damaged(tiny_onnx, tmp_path / "bad")
    (directory / "model.onnx").write_bytes(b"not a graph at all")
    with pytest.raises(IntegrityError, match=r"model\.onnx is not an ONNX file"):
        runtime.load(directory)


def test_a_graph_cut_off(tiny_onnx, tmp_path):
    directory = damaged(tiny_onnx, tmp_path / "bad")
    content = (directory / "model.onnx").read_bytes()
    (directory / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        runtime.load(directory)


def test_weights_cut_off(tiny_onnx, tmp_path):
    directory = damaged(tiny_onnx, tmp_path / "bad")
    content = (directory / "model.onnx.data").read_bytes()
    (directory / "model.onnx.data").write_bytes(content[:1000])
    with pytest.raises(IntegrityError, match="onnxruntime can't load"):
        runtime.load(directory)


def test_weights_gone(tiny_onnx, tmp_path):
    directory = damaged(tiny_onnx, tmp_path / "bad")
    (directory / "model.onnx.data").unlink()
    with pytest.raises(IntegrityError, match="onnxruntime can't load"):
        runtime.load(directory)


def test_graph_gone(tiny_onnx, tmp_path):
    directory = damaged(tiny_onnx, tmp_path / "bad")
    (directory / "model.onnx").unlink()
    with pytest.raises(InputMissingError, match=r"has no model\.onnx"):
        runtime.load(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"decoder": {"filename": 3}}}'])
def test_a_configuration_that_is_none(tiny_onnx, tmp_path, text):
    directory = damaged(tiny_onnx, tmp_path / "bad")
    (directory / "genai_config.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"isn't a decoder's configuration|genai_config\.json: "):
        runtime.load(directory)


def test_serving_needs_no_torch(tiny_onnx):
    code = (
        "import sys, numpy, pathlib; from optikit import runtime\n"
        "decoder = runtime.load(pathlib.Path(sys.argv[1]), threads=1)\n"
        "assert len(list(decoder.greedy(numpy.array([5, 6]), 3))) == 3\n"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_onnx)], check=True)
