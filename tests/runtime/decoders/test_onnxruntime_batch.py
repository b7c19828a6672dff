"""Several texts through one graph: each attends to its own cache, and gets the numbers that it gets alone."""

from __future__ import annotations

import numpy as np
import onnx
import psutil
import pytest

from optikit import runtime
from optikit.errors import UsageError
from optikit.runtime.decoder import Window
from optikit.runtime.decoders import onnxruntime_batch
from optikit.runtime.decoders.onnxruntime import paged_zeros
from optikit.runtime.speculation.acceptors import Greedy, SampleMatch, Sampling
from optikit.runtime.speculation.batch_loop import generate_batch
from optikit.runtime.speculation.decoding_loop import Request, generate
from optikit.runtime.speculation.drafters import FirstOf, Medusa, NoDraft, PromptLookup

RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(3, 259, n) for n in (31, 7, 50)]


@pytest.fixture(scope="module")
def decoder(tiny_onnx):
    return runtime.load(tiny_onnx, threads=1)


@pytest.fixture(scope="module")
def int4(tiny_onnx_int4):
    return runtime.load(tiny_onnx_int4, threads=1)


def test_ragged_windows_at_ragged_positions_roll_back_and_move(decoder):
    batch = decoder.batched(3)
    filled = [0, 0, 0]
    for step, (lengths, back) in enumerate(
        [((9, 3, 1), 0), ((1, 1, 1), 0), ((4, 1, 7), 2), ((1, 3, 2), 0), ((8, 2, 9), 1)]
    ):
        starts = [max(0, each - back) for each in filled]
        windows = [
            Window(place, TEXTS[place][start : start + m], start, 1 + (m > 2))
            for place, (start, m) in enumerate(zip(starts, lengths, strict=True))
            if (step, place) != (3, 1)  # one sits out
        ]
        found = batch.forward(windows)
        for i, each in enumerate(windows):
            filled[each.place] = end = each.position + len(each.tokens)
            expected = decoder.forward(TEXTS[each.place][:end], 0, each.rows)
            np.testing.assert_allclose(found[i], expected, atol=3e-6)
            for row in range(each.rows):
                np.testing.assert_allclose(batch.hidden(i, row), decoder.hidden(row), atol=3e-5)
    batch.move(2, 0)
    start = filled[2]
    stacked = batch.forward([Window(0, TEXTS[2][start : start + 1], start, 1), Window(1, TEXTS[1][:1], 0, 1)])
    np.testing.assert_allclose(stacked[0], decoder.forward(TEXTS[2][: start + 1], 0, 1), atol=3e-6)
    np.testing.assert_allclose(stacked[1], decoder.forward(TEXTS[1][:1], 0, 1), atol=3e-6)
    np.testing.assert_allclose(batch.hidden(1, 0), decoder.hidden(0), atol=3e-5)
    for again in (0, 0):
        found = batch.forward([Window(again, TEXTS[2][start : start + 4], start, 4)])[0]
        np.testing.assert_allclose(found, decoder.forward(TEXTS[2][: start + 4], 0, 4), atol=3e-6)
    with pytest.raises(UsageError, match="isn't within the 0 tokens"):
        batch.forward([Window(2, TEXTS[2][:1], 1, 1)])


def test_a_long_prompt_goes_through_in_chunks(decoder, monkeypatch):
    monkeypatch.setattr(onnxruntime_batch, "CHUNK", 7)
    found = decoder.batched(2).forward([Window(0, TEXTS[2], 0, 3), Window(1, TEXTS[0], 0, 20)])
    np.testing.assert_allclose(found[0], decoder.forward(TEXTS[2], 0, 3), atol=3e-6)
    np.testing.assert_allclose(found[1], decoder.forward(TEXTS[0], 0, 20), atol=3e-6)


def heads(hidden, *_):
    return (np.abs(hidden[:3]) * 1000).astype(np.int64) % 260, np.ones(3, np.float32)


MADE = {
    "silent": NoDraft,
    "lookup": lambda: PromptLookup({2: 5, 1: 2}),
    "heads": lambda: FirstOf([PromptLookup({3: 4}), Medusa(heads)]),
}


@pytest.mark.parametrize("graph", ["float32", "int4"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("drafter", MADE)
def test_texts_are_those_of_the_loop_for_one(decoder, int4, graph, drafter, sampled):
    """Rounded activations, too: windows of even length go through the same kernels whoever stands beside them."""
    alone = decoder if graph == "float32" else int4
    acceptor = SampleMatch(Sampling(temperature=0.8, top_p=0.95)) if sampled else Greedy()
    prompts = [np.tile(text[: 3 + 4 * i], 1 + i % 2) for i, text in enumerate(TEXTS * 2)]
    requests = [
        Request(max_new_tokens=10 + 3 * i, eos=frozenset(range(20 * (i % 3))), seed=i, min_window=2)
        for i in range(len(prompts))
    ]
    drafters = [MADE[drafter]() for _ in range(3)]
    texts = [[] for _ in prompts]
    for number, step in generate_batch(alone.batched(3), drafters, acceptor, prompts, requests):
        texts[number] += step.tokens
    for prompt, request, text in zip(prompts, requests, texts, strict=True):
        steps = generate(alone, MADE[drafter](), acceptor, prompt, request)
        assert text == [token for step in steps for token in step.tokens]


def test_the_last_position_of_a_cache_may_be_used(tiny_onnx, decoder):
    small = runtime.load(tiny_onnx, threads=1, max_tokens=40).batched(2)
    prompts, requests = [TEXTS[0], TEXTS[1]], [Request(max_new_tokens=9), Request(max_new_tokens=33)]
    texts = [[], []]
    for number, step in generate_batch(small, [NoDraft(), NoDraft()], Greedy(), prompts, requests):
        texts[number] += step.tokens
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == list(decoder.greedy(prompt, len(text)))


@pytest.mark.parametrize("place", [9, 10])
def test_attention_that_cannot_be_had_once_per_text_is_refused(decoder, place):
    model = onnx.load(str(decoder._layout.graph), load_external_data=False)
    node = next(each for each in model.graph.node if each.op_type == "GroupQueryAttention")
    node.input[place] = "input_ids"
    with pytest.raises(UsageError, match="takes positions or a bias of its own"):
        onnxruntime_batch.attend_apart(model.graph, decoder._layout, 2)


def test_a_mask_that_others_read_is_refused(tiny_onnx, decoder):
    model = onnx.load(str(decoder._layout.graph), load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["attention_mask"], ["seen"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("seen", onnx.TensorProto.INT64, []))
    with pytest.raises(UsageError, match="read attention_mask"):
        onnxruntime_batch.attend_apart(model.graph, decoder._layout, 2)
    with pytest.raises(UsageError, match="a batch of 0 texts holds none"):
        decoder.batched(0)


def test_a_cache_takes_memory_only_where_it_is_written():
    process = psutil.Process()
    before = process.memory_info().rss
    cache = paged_zeros((32, 2**19))
    cache[:, 0] = 1  # a number in every huge page
    assert process.memory_info().rss - before < cache.nbytes / 8
    assert cache.sum() == 32
