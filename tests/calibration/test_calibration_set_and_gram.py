"""Windows of a text, and the sums made of what goes through the model."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from optikit.calibration import calibration_set
from optikit.calibration.gram import STRIP, Gram, PairedGram
from optikit.calibration.method import Batch, Group
from optikit.errors import InputMissingError, StageFailedError


def test_windows_are_passages_of_the_text_spread_over_all_of_it(tiny_llama, prose):
    drawn = calibration_set.draw(tiny_llama, prose, samples=20, length=64, seed=1)
    assert drawn.shape == (20, 64)
    text = prose.read_text()
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    places = [text.index(tokenizer.decode(row)) for row in drawn.tolist()]
    assert places == sorted(places)
    assert places[0] < len(text) / 10
    assert places[-1] > len(text) * 9 / 10
    assert torch.equal(drawn, calibration_set.draw(tiny_llama, prose, samples=20, length=64, seed=1))
    assert not torch.equal(drawn, calibration_set.draw(tiny_llama, prose, samples=20, length=64, seed=2))


def test_pieces_are_the_text(tiny_llama, prose, monkeypatch):
    expected = calibration_set.draw(tiny_llama, prose, samples=4, length=500, seed=0)
    monkeypatch.setattr(calibration_set, "CHUNK_CHARACTERS", 50)
    assert torch.equal(calibration_set.draw(tiny_llama, prose, samples=4, length=500, seed=0), expected)


def test_a_text_of_exactly_one_window_will_do(tiny_llama, tmp_path):
    text = tmp_path / "text"
    text.write_text("x" * 32)
    assert calibration_set.draw(tiny_llama, text, samples=3, length=32, seed=0).unique().numel() == 1
    with pytest.raises(StageFailedError, match="has 32 tokens, fewer than one calibration window of 33"):
        calibration_set.draw(tiny_llama, text, samples=3, length=33, seed=0)


def test_windows_begin_as_the_tokenizer_begins_texts(tiny_llama, prose, tmp_path):
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    drawn = calibration_set.draw(tmp_path, prose, samples=3, length=16, seed=0)
    assert drawn.shape == (3, 16)
    assert (drawn[:, 0] == 0).all()
    assert (drawn[:, 1:] > 2).all()


def test_truncation_and_padding_that_the_file_stores_are_not_obeyed(tiny_llama, prose, tmp_path):
    stored = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    stored.enable_truncation(64)
    stored.enable_padding(length=96, pad_id=2)
    stored.save(str(tmp_path / "tokenizer.json"))
    expected = calibration_set.draw(tiny_llama, prose, samples=40, length=128, seed=1)
    assert torch.equal(calibration_set.draw(tmp_path, prose, samples=40, length=128, seed=1), expected)


def test_without_a_tokenizer_there_are_no_windows(tmp_path, prose):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(InputMissingError, match=r"has no tokenizer\.json"):
        calibration_set.draw(tmp_path, prose, samples=1, length=8, seed=0)


@settings(max_examples=10)
@given(
    width=st.sampled_from([1, 7, STRIP, STRIP + 5]),
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_gram_is_the_mean_of_outer_products(width, parts, dtype):
    draw = torch.Generator().manual_seed(width)
    batches = [torch.randn(tokens, width, generator=draw).to(dtype) for tokens in parts]
    gram = Gram(Group(names=("a",), weights=(torch.zeros(1, width),)))
    for inputs in batches:
        gram.update(Batch(inputs=inputs, dense_inputs=inputs))
    x = torch.cat(batches).double()
    assert torch.allclose(gram.mean().double(), x.T @ x / len(x), atol=1e-5)
    assert torch.equal(gram.mean(), gram.mean().T)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lacking_is_what_least_squares_is_asked_for(residual, dtype):
    draw = torch.Generator().manual_seed(0)
    weights = (torch.randn(6, 12, generator=draw),) if residual else tuple(torch.randn(2, 4, 12, generator=draw))
    weight = torch.cat(weights)
    gram = PairedGram(Group(names=("a", "b")[: len(weights)], weights=weights), damp=0.01)
    sums = torch.zeros(weight.shape, dtype=torch.float64)
    for _ in range(3):
        inputs, dense = (torch.randn(50, 12, generator=draw).to(dtype) for _ in range(2))
        residual_gap = torch.randn(50, len(weight), generator=draw) if residual else None
        gram.update(Batch(inputs=inputs, dense_inputs=dense, residual_gap=residual_gap))
        gap = (dense.double() - inputs.double()) @ weight.double().T
        sums += (gap + (0 if residual_gap is None else residual_gap.double())).T @ inputs.double()
    tolerance = 1e-5 if dtype is torch.float32 else 3e-3
    assert torch.allclose(gram.lacking().double(), sums / 150, atol=tolerance * float(weight.norm()))
