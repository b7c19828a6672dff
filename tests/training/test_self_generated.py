"""Which texts share a batch, and that sharing one changes none of them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from optikit.training import self_generated
from optikit.training.self_generated import _batches


@given(lengths=st.lists(st.integers(1, 50), max_size=40), most=st.integers(1, 8), room=st.integers(1, 200))
def test_batches_hold_every_text_once_and_no_more_than_fits(lengths: list[int], most: int, room: int) -> None:
    found = list(_batches(lengths, most, room))
    assert sorted(chain.from_iterable(found)) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[index] for index in batch)
        assert len(batch) <= most
        assert len(batch) == 1 or len(batch) * longest <= room


def test_a_text_does_not_depend_on_those_beside_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    prompts = [list(range(3, 3 + length)) for length in (2, 9, 5, 20, 11)]
    together = self_generated.write(model, prompts, new_tokens=6, ends=frozenset(), folder=tmp_path / "a")
    apart = self_generated.write(
        model, prompts, new_tokens=6, ends=frozenset(), folder=tmp_path / "b", most=(self_generated.BATCH, 30)
    )
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert torch.equal(together.documents, apart.documents)
    assert torch.equal(together.tokens, apart.tokens)
    torch.testing.assert_close(together.hidden, apart.hidden, atol=1e-5, rtol=1e-5)
    damaged = next((tmp_path / "a").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 0x10  # still a safetensors file
    damaged.write_bytes(content)
    notes: list[str] = []
    again = self_generated.write(
        model, prompts, new_tokens=6, ends=frozenset(), folder=tmp_path / "a", note=notes.append
    )
    assert torch.equal(again.hidden, together.hidden)
    assert len(notes) == 1


def _tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_the_first_answer_to_each_prompt_is_greedy_and_the_others_are_drawn_alike_again(tmp_path: Path) -> None:
    model, answers = _tiny(), 4
    prompts = [list(range(3, 3 + length)) for length in (2, 9, 5)]
    asked = [prompt for prompt in prompts for _ in range(answers)]
    drawing = self_generated.Drawing(answers=answers, temperature=1.5, seed=3)
    greedy = self_generated.write(model, prompts, new_tokens=8, ends=frozenset(), folder=tmp_path / "greedy")
    drawn = self_generated.write(
        model, asked, new_tokens=8, ends=frozenset(), folder=tmp_path / "a", drawing=drawing, most=(5, 200)
    )
    again = self_generated.write(
        model, asked, new_tokens=8, ends=frozenset(), folder=tmp_path / "b", drawing=drawing, most=(5, 200)
    )
    assert torch.equal(drawn.tokens, again.tokens)
    texts = [tuple(drawn.tokens[drawn.documents == i].tolist()) for i in range(len(asked))]
    plain = [tuple(greedy.tokens[greedy.documents == i].tolist()) for i in range(len(prompts))]
    assert texts[::answers] == plain
    assert len({text for index, text in enumerate(texts) if index % answers}) > len(prompts)
    learning, held = self_generated.divide(drawn, 0.5)
    assert set(held.documents.tolist()) == {0, 2 * answers}
    assert set(learning.documents.tolist()) == set(range(answers, 2 * answers))


def test_answers_are_drawn_as_often_as_the_model_says(tmp_path: Path) -> None:
    model, answers, temperature = _tiny(), 4001, 0.8
    drawing = self_generated.Drawing(answers=answers, temperature=temperature)
    text = self_generated.write(
        model, [[5]] * answers, new_tokens=1, ends=frozenset(), folder=tmp_path, drawing=drawing, most=(answers, 10**6)
    )
    first = text.tokens[text.wanted][1:]
    odds = (model(torch.tensor([[5]])).logits[0, -1] / temperature).softmax(-1)
    found = torch.bincount(first, minlength=32) / len(first)
    uniform = torch.full((32,), 1 / 32)
    assert (found - odds).abs().sum() / 2 < 0.04 < (found - uniform).abs().sum() / 2
