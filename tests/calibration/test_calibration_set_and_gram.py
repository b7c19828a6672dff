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
def test_a_correction_is_fitted_to_some_windows_tried_on_others_and_made_of_all(residual, dtype):
    draw = torch.Generator().manual_seed(0)
    weights = (torch.randn(6, 12, generator=draw),) if residual else tuple(torch.randn(2, 4, 12, generator=draw))
    weight = torch.cat(weights).double()
    gram = PairedGram(Group(names=("a", "b")[: len(weights)], weights=weights), damp=0.01)
    there = torch.randn(len(weight) if residual else 12, 12, generator=draw) / 4
    windows: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {False: [], True: []}
    for held_out in ((False, False, True), (False,), (True, False)):
        inputs = torch.randn(20 * len(held_out), 12, generator=draw).to(dtype)
        gap = inputs.float() @ there.T + torch.randn(len(inputs), len(there), generator=draw)
        dense = inputs if residual else (inputs.float() + gap).to(dtype)
        lacks = gap if residual else None
        gram.update(Batch(inputs=inputs, dense_inputs=dense, residual_gap=lacks, held_out=held_out))
        lacking = gap.double() if residual else (dense.double() - inputs.double()) @ weight.T
        for each, x, d in zip(held_out, inputs.double().split(20), lacking.split(20), strict=True):
            windows[each].append((x, d))
    fit, tried = ([torch.cat(part) for part in zip(*windows[each], strict=True)] for each in (False, True))
    everything = [torch.cat(part) for part in zip(fit, tried, strict=True)]
    moved, final = _ridge(*fit), _ridge(*everything)
    x, d = tried
    rows = [(moved * (d.T @ x)).sum(1), (moved @ (x.T @ x) * moved).sum(1)]
    found = gram.corrected()
    expected, place = weight.clone(), 0
    for each, by in zip(weights, found.factors, strict=True):
        part = slice(place, place + len(each))
        best = float(rows[0][part].sum() / rows[1][part].sum())
        assert by == pytest.approx(min(1, max(0, best)), abs=0.01)
        expected[part] += by * final[part]
        place += len(each)
    assert torch.allclose(found.weight.double(), expected, atol=1e-4 if dtype is torch.float32 else 0.02)
    assert any(found.factors)
    assert gram.tokens == 120
    assert torch.allclose(gram.mean().double(), everything[0].T @ everything[0] / 120, atol=1e-4)


def _ridge(inputs: torch.Tensor, lacking: torch.Tensor) -> torch.Tensor:
    hessian = inputs.T @ inputs / len(inputs)
    held_back = 0.01 * max(1, 10 * len(hessian) / len(inputs)) * hessian.diagonal().mean()
    damped = hessian + held_back * torch.eye(len(hessian), dtype=torch.float64)
    return torch.linalg.solve(damped, inputs.T @ lacking / len(inputs)).T


def test_where_nothing_was_held_out_nothing_is_corrected():
    draw = torch.Generator().manual_seed(0)
    inputs, dense, weight = (torch.randn(count, 8, generator=draw) for count in (30, 30, 4))
    gram = PairedGram(Group(names=("a",), weights=(weight,)), damp=0.01)
    gram.update(Batch(inputs=inputs, dense_inputs=dense))
    found = gram.corrected()
    assert found.factors == (0.0,)
    assert torch.equal(found.weight, weight)
    assert torch.allclose(gram.mean(), inputs.T @ inputs / 30, atol=1e-6)


@pytest.mark.parametrize(("samples", "held"), [(1, 0), (2, 1), (3, 1), (4, 1), (7, 1), (24, 6)])
def test_a_fixed_share_of_the_windows_is_held_out(samples, held):
    found = calibration_set.held_out(samples)
    assert (len(found), int(found.sum())) == (samples, held)
