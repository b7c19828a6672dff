"""Several texts through one transformers model: each gets the logits that it gets alone, wherever the others are."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from optikit import runtime
from optikit.errors import UsageError
from optikit.runtime.decoder import Window
from optikit.runtime.decoders.transformers_batch import TorchBatch
from optikit.runtime.speculation.acceptors import Greedy, SampleMatch, Sampling
from optikit.runtime.speculation.batch_loop import generate_batch
from optikit.runtime.speculation.decoding_loop import Request, generate
from optikit.runtime.speculation.drafters import FirstOf, Medusa, NoDraft, PromptLookup
from optikit.runtime.speculation.logits_processors import RepetitionPenalty

RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(3, 259, n) for n in (31, 7, 50)]


@pytest.fixture(scope="module")
def decoder(tiny_llama):
    return runtime.load(tiny_llama, dtype="float32", threads=1)


def wanted(decoder, text, upto, rows):
    return decoder.forward(text[:upto], 0)[-rows:]


def test_ragged_windows_at_ragged_positions_roll_back_and_move(decoder):
    batch = decoder.batched(3)
    filled = [0, 0, 0]
    for step, (lengths, back) in enumerate([((9, 3, 1), 0), ((4, 1, 7), 2), ((1, 3, 2), 0), ((8, 2, 9), 1)]):
        starts = [max(0, each - back) for each in filled]
        windows = [
            Window(place, TEXTS[place][start : start + m], start, 1 + (m > 2))
            for place, (start, m) in enumerate(zip(starts, lengths, strict=True))
            if (step, place) != (2, 1)  # one sits out
        ]
        found = batch.forward(windows)
        for i, each in enumerate(windows):
            filled[each.place] = end = each.position + len(each.tokens)
            expected = wanted(decoder, TEXTS[each.place], end, each.rows)
            np.testing.assert_allclose(found[i], expected, atol=3e-6)
            for row in range(each.rows):
                shown = decoder.hidden(end - each.rows + row)
                np.testing.assert_allclose(batch.hidden(i, row), shown, atol=3e-5)
    batch.move(2, 0)
    start = filled[2]
    found = batch.forward([Window(0, TEXTS[2][start : start + 4], start, 4)])[0]
    np.testing.assert_allclose(found, wanted(decoder, TEXTS[2], start + 4, 4), atol=3e-6)
    with pytest.raises(UsageError, match="isn't within the 0 tokens"):
        batch.forward([Window(2, TEXTS[2][:1], 1, 1)])


def saved(tmp_path, kind):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "sliding_window": 8,
    }
    if kind == "mistral":
        MistralForCausalLM(MistralConfig(**sizes)).save_pretrained(tmp_path)
    else:
        layer_types = ["full_attention", "sliding_attention" if kind == "mixed" else "full_attention"]
        config = Qwen3Config(**sizes, use_sliding_window=kind == "mixed", layer_types=layer_types)
        Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["mistral", "mixed", "full"])
def test_layers_look_as_far_back_as_they_do_alone(tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path, kind), dtype=torch.float32)
    batch = TorchBatch(model, places=2, max_tokens=128)
    batch.forward([Window(0, TEXTS[0][:20], 0, 1), Window(1, TEXTS[2][:30], 0, 1)])
    found = batch.forward([Window(0, TEXTS[0][18:25], 18, 7), Window(1, TEXTS[2][30:32], 30, 2)])
    for text, end, logits in ((TEXTS[0], 25, found[0]), (TEXTS[2], 32, found[1])):
        with torch.inference_mode():
            alone = model(torch.from_numpy(text[:end])[None]).logits[0, -len(logits) :].numpy()
        np.testing.assert_allclose(logits, alone, atol=3e-6)


def heads(hidden, *_):
    return (np.abs(hidden[:3]) * 1000).astype(np.int64) % 260, np.ones(3, np.float32)


@pytest.mark.parametrize(
    "acceptor", [Greedy(), SampleMatch(Sampling(temperature=0.8, top_p=0.95))], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("drafter", ["silent", "lookup", "heads"])
def test_texts_are_those_of_the_loop_for_one(decoder, drafter, acceptor):
    made = {
        "silent": NoDraft,
        "lookup": lambda: PromptLookup({2: 5, 1: 2}),
        "heads": lambda: FirstOf([PromptLookup({3: 4}), Medusa(heads)]),
    }[drafter]
    prompts = [np.tile(text[: 3 + 4 * i], 1 + i % 2) for i, text in enumerate(TEXTS * 2)]
    alone = [list(decoder.greedy(prompt, 24)) for prompt in prompts]
    requests = [
        Request(
            max_new_tokens=10 + 3 * i,
            eos=frozenset(alone[i][6:7] if i % 3 == 1 else ()),
            processors=(RepetitionPenalty(1.2),) if i % 2 else (),
            seed=i,
        )
        for i in range(len(prompts))
    ]
    texts = [[] for _ in prompts]
    for number, step in generate_batch(decoder.batched(3), [made() for _ in range(3)], acceptor, prompts, requests):
        texts[number] += step.tokens
    for prompt, request, text in zip(prompts, requests, texts, strict=True):
        steps = generate(decoder, made(), acceptor, prompt, request)
        assert text == [token for step in steps for token in step.tokens]


def test_a_batch_of_nothing_and_layers_that_remember_everything(decoder):
    with pytest.raises(UsageError, match="a batch of 0 texts holds none"):
        decoder.batched(0)

    recurrent = SimpleNamespace(config=SimpleNamespace(layer_types=("full_attention", "linear_attention")))
    with pytest.raises(UsageError, match="layers of kind linear_attention can't be rolled back"):
        TorchBatch(recurrent, places=2, max_tokens=8)
