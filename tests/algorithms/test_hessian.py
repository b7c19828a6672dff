"""The factor of the inverse Hessian against an inverse computed in double, and what it does where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.algorithms.hessian import DAMPINGS, cholesky, inverse_factor


def hessian(width: int, tokens: int, seed: int) -> torch.Tensor:
    inputs = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return inputs.T @ inputs / tokens


@settings(max_examples=25)
@given(width=st.integers(1, 24), tokens=st.integers(1, 60), seed=st.integers(0, 99), ordered=st.booleans())
def test_factor_squared_is_the_inverse(width, tokens, seed, ordered):
    matrix = hessian(width, tokens, seed)
    before = matrix.clone()
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed)) if ordered else None
    upper, damp = inverse_factor(matrix, 0.01, order)
    assert damp == 0.01
    assert torch.equal(matrix, before)
    assert torch.equal(upper, upper.triu())
    wide = matrix.double() + 0.01 * matrix.double().diagonal().mean() * torch.eye(width)
    wide = wide if order is None else wide[order][:, order]
    expected = torch.linalg.inv(wide)
    assert torch.allclose(
        upper.double().T @ upper.double(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max())
    )


def test_a_row_of_the_factor_is_that_of_the_inverse_without_the_columns_before():
    matrix = hessian(6, 40, 0)
    upper, _ = inverse_factor(matrix, 0.01)
    damped = matrix.double() + 0.01 * matrix.double().diagonal().mean() * torch.eye(6)
    for column in range(6):
        row = torch.linalg.inv(damped[column:, column:])[0]
        assert torch.allclose(upper[column, column:].double() / upper[column, column], row / row[0], atol=1e-4)


def test_an_indefinite_hessian_gets_more_damping_then_none():
    matrix = torch.eye(8)
    matrix[0, 0] = -0.5
    _, damp = inverse_factor(matrix, 0.01)
    assert damp == 0.01 * DAMPINGS[-1]
    assert inverse_factor(-torch.eye(8), 0.01) is None
    assert inverse_factor(torch.full((8, 8), torch.nan), 0.01) is None


def test_cholesky_takes_the_memory_of_its_matrix():
    matrix = hessian(32, 100, 1)
    expected = torch.linalg.cholesky(matrix)
    place = matrix.data_ptr()
    lower = cholesky(matrix)
    assert lower.data_ptr() == place
    assert torch.equal(lower, expected)


@pytest.mark.parametrize("width", [1, 5])
def test_columns_that_were_never_active_stand_on_their_own(width):
    upper, _ = inverse_factor(torch.zeros(width, width), 0.01)
    assert torch.allclose(upper, torch.eye(width) * 10)
