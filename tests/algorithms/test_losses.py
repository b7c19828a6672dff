"""The joint loss: against the paper's formula written out as a loop, and what it gives to whom."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optikit.algorithms.losses import divergence, heads_loss, joint_loss, targets_of
from optikit.algorithms.medusa import IGNORED, MedusaHeads

VOCAB, WIDTH, TOKENS = 11, 8, 9
PROMPT = 4


@pytest.fixture
def heads() -> MedusaHeads:
    torch.manual_seed(0)
    found = MedusaHeads(torch.randn(VOCAB, WIDTH), heads=3, layers=2)
    with torch.no_grad():
        for each in found.blocks.parameters():
            each.normal_(0, 0.3)
    return found


@pytest.fixture
def window() -> Tensor:
    return torch.randint(0, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def drawn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_p(row: Tensor, token: int) -> float:
    return math.log(math.exp(row[token]) / sum(math.exp(value) for value in row))


def test_a_head_looks_beyond_the_next_token_and_not_out_of_the_window(window):
    found = targets_of(window, 3, PROMPT)
    for t in range(TOKENS):
        for k in range(3):
            ahead = t + 2 + k
            assert found[t, k] == (window[0, ahead] if PROMPT <= ahead < TOKENS else IGNORED)


@pytest.mark.parametrize("prompt", [0, PROMPT])
@pytest.mark.parametrize("own", [False, True])
def test_the_loss_is_that_of_the_paper(own, prompt, heads, window):
    states, logits, original = drawn(TOKENS, WIDTH), drawn(1, TOKENS, VOCAB, seed=3), drawn(1, TOKENS, VOCAB, seed=4)
    ahead = 0.0
    for k in range(3):
        places = [t for t in range(TOKENS) if prompt <= t + 2 + k < TOKENS]
        rows = {t: heads.logits(k, states[t : t + 1])[0].detach() for t in places}
        mean = sum(-log_p(rows[t], int(window[0, t + 2 + k])) for t in places) / len(places)
        ahead += 0.8 ** (k + 1) * mean
    if own:
        pairs = [(original[0, t], logits[0, t]) for t in range(TOKENS)]
        terms = (math.exp(log_p(p, v)) * (log_p(p, v) - log_p(q, v)) for p, q in pairs for v in range(VOCAB))
        backbone = sum(terms) / TOKENS
    else:
        backbone = sum(-log_p(logits[0, t], int(window[0, t + 1])) for t in range(TOKENS - 1)) / (TOKENS - 1)
    told = heads_loss(heads, states, targets_of(window, 3, prompt))
    assert float(told.detach()) == pytest.approx(ahead, rel=1e-5)
    found = joint_loss(logits, window, told, weight=0.2, original=original if own else None)
    assert float(found.detach()) == pytest.approx(backbone + 0.2 * ahead, rel=1e-5)


def test_the_model_learns_from_both_and_heads_from_theirs_alone(heads, window):
    """What flows back into the states is the gradient of the one plus λ0 times that of the other."""
    output = drawn(VOCAB, WIDTH, seed=5)

    def gradients(weight: float, *, backbone: bool) -> tuple[Tensor, Tensor]:
        states = drawn(TOKENS, WIDTH).requires_grad_()
        heads.zero_grad()
        ahead = heads_loss(heads, states, targets_of(window, 3))
        own = joint_loss((states @ output.T)[None], window, ahead, weight=weight)
        (own if backbone else weight * ahead).backward()
        first = next(heads.blocks.parameters()).grad
        assert states.grad is not None
        assert first is not None
        return states.grad, first.clone()

    (both, of_heads), (ahead, alone) = gradients(0.3, backbone=True), gradients(0.3, backbone=False)
    own, silent = gradients(0.0, backbone=True)
    torch.testing.assert_close(both, own + ahead)
    torch.testing.assert_close(of_heads, alone)
    assert not silent.any()


def test_a_model_that_has_not_moved_has_no_loss_of_its_own(heads, window):
    logits = drawn(1, TOKENS, VOCAB)
    ahead = heads_loss(heads, drawn(TOKENS, WIDTH), targets_of(window, 3)).detach()
    assert float(joint_loss(logits, window, ahead, weight=1.0, original=logits)) == pytest.approx(float(ahead))


def test_divergence_is_that_of_the_definition():
    student, teacher = torch.randn(2, 1, 5, 11, generator=torch.Generator().manual_seed(0)).unbind()
    for temperature in (1.0, 2.0):
        p, q = ((each[0] / temperature).softmax(-1).double() for each in (teacher, student))
        expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
        assert float(divergence(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence(teacher, teacher, 1.0)) == pytest.approx(0, abs=1e-7)
