"""A model's own loss and that of the heads that read ahead from its hidden states, together (Medusa-2).

Paper   Cai et al. 2024, arXiv:2401.10774, section 2.2.2: L = L_LM + λ0 Σ_k λ_k L_k; with the original model's own
        predictions as the aim, section 2.3.2: L_LM is the divergence from them
"""

from __future__ import annotations

import torch
from torch import Tensor

from optikit.algorithms.finetune import cross_entropy, divergence
from optikit.algorithms.medusa import MedusaHeads, losses, make_targets


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
