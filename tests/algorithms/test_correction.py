"""The correction against least squares in double, and its factor against every other one on tokens held out."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.algorithms.correction import ENOUGH, factor, gains, move


def problem(width: int, rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=draw)
    lacking = inputs @ torch.randn(width, rows, generator=draw) + 3 * torch.randn(tokens, rows, generator=draw)
    return inputs, lacking


def means(inputs: torch.Tensor, lacking: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs.T @ inputs / len(inputs), lacking.T @ inputs / len(inputs)


@settings(max_examples=25)
@given(width=st.integers(1, 20), rows=st.integers(1, 6), tokens=st.integers(1, 400), seed=st.integers(0, 99))
def test_a_move_is_ridge_regression(width, rows, tokens, seed):
    inputs, lacking = problem(width, rows, tokens, seed)
    hessian, wanted = means(inputs, lacking)
    held_back = 0.1 * max(1, ENOUGH * width / tokens) * float(hessian.diagonal().mean())
    stacked = np.concatenate([inputs.double().numpy(), np.sqrt(held_back * tokens) * np.eye(width)])
    aims = np.concatenate([lacking.double().numpy(), np.zeros((width, rows))])
    expected = np.linalg.lstsq(stacked, aims, rcond=None)[0].T
    assert np.allclose(move(hessian, wanted, damp=0.1, tokens=tokens).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_factored_moves_nothing():
    broken = torch.full((3, 3), float("nan"))
    assert torch.equal(move(broken, torch.ones(2, 3), damp=0.1, tokens=9), torch.zeros(2, 3))
    assert torch.equal(move(torch.zeros(3, 3), torch.ones(2, 3), damp=0.1, tokens=9), torch.zeros(2, 3))


@settings(max_examples=25)
@given(width=st.integers(1, 12), rows=st.integers(1, 4), tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_no_other_factor_loses_less_on_the_tokens_held_out(width, rows, tokens, seed):
    moved = move(*means(*problem(width, rows, tokens, seed)), damp=0.05, tokens=tokens).double()
    inputs, lacking = (part.double() for part in problem(width, rows, 40, seed + 100))
    found = factor(*gains(moved, *means(inputs, lacking)))

    def loss(by: float) -> float:
        return float((lacking - by * inputs @ moved.T).square().sum())

    assert 0 <= found <= 1
    assert loss(found) <= min(loss(by) for by in np.linspace(0, 1, 21)) * (1 + 1e-6)


def test_a_move_that_only_fits_noise_is_not_made():
    inputs, _ = problem(30, 5, 30, seed=0)
    noise = torch.randn(30, 5, generator=torch.Generator().manual_seed(7))
    moved = move(*means(inputs, noise), damp=0.01, tokens=30)
    others, _ = problem(30, 5, 4000, seed=1)
    unrelated = torch.randn(4000, 5, generator=torch.Generator().manual_seed(8))
    assert factor(*gains(moved, *means(others, unrelated))) < 0.05
    assert factor(*gains(moved, *means(others, -others @ moved.T))) == 0
    assert factor(*gains(moved, *means(others, 2 * others @ moved.T))) == 1


def test_nothing_held_out_corrects_nothing():
    assert factor(torch.zeros(4), torch.zeros(4)) == 0
