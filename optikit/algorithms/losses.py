"""Losses of training, in nats: next tokens, divergence from a teacher, Medusa heads, and the two together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optikit.algorithms.medusa import MedusaHeads, losses, make_targets


def cross_entropy(logits: Tensor, window: Tensor) -> Tensor:
    """Return the mean loss of the next tokens, in nats.

    Args:
        logits: (1, tokens, vocabulary).
        window: (1, tokens) int64.
    """
    return nn.functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean of T² KL(teacher || student) over tokens, in nats, both softened by T (Hinton et al., section 2).

    Args:
        student: Logits, (1, tokens, vocabulary).
        teacher: The same.
        temperature: T; 1 compares the distributions as they are.
    """
    aim = torch.log_softmax(teacher[0].float() / temperature, dim=-1)
    own = torch.log_softmax(student[0].float() / temperature, dim=-1)
    return nn.functional.kl_div(own, aim, reduction="batchmean", log_target=True) * temperature**2


def targets_of(window: Tensor, heads: int, prompt: int = 0) -> Tensor:
    """Return what each head is to predict at each position of a window.

    Args:
        window: (1, tokens) int64, one document.
        heads: K.
        prompt: Tokens at the beginning that nobody has to predict.

    Returns:
        (tokens, K) int64, on the window's device; see `make_targets`.
    """
    tokens = window[0].cpu()
    wanted = torch.arange(len(tokens)) >= prompt
    return make_targets(tokens, torch.zeros_like(tokens), wanted, heads).to(window.device)


def heads_loss(heads: MedusaHeads, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return Σ_k λ_k L_k, in nats.

    Args:
        heads: The heads.
        hidden: (tokens, width) of one window.
        targets: (tokens, K) of `targets_of`.
    """
    return torch.stack(list(losses(heads, hidden.float(), targets))).sum()


def joint_loss(
    logits: Tensor,
    window: Tensor,
    ahead: Tensor,
    *,
    weight: float,
    original: Tensor | None = None,
) -> Tensor:
    """Return L_LM + λ0 · ahead, in nats.

    Args:
        logits: (1, tokens, vocabulary): what the model predicts.
        window: (1, tokens) int64.
        ahead: Scalar of `heads_loss`.
        weight: λ0.
        original: Logits of the untrained model, the aim of L_LM; None takes the next token of the text.
    """
    own = cross_entropy(logits, window) if original is None else divergence(logits, original, 1.0)
    return own + weight * ahead
