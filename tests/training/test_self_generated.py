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
