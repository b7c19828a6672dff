"""EAGLE-3: one decoder layer drafts from the target's hidden states of three depths, and then from its own.

Paper   Li et al. 2025, arXiv:2503.01840 (EAGLE-3); the layer is the one of EAGLE, arXiv:2401.15077
Cost    a layer of twice the input width and an output layer of the draft vocabulary per drafted token
Differs queries are computed only where an answer is predicted, which is what answer-only loss needs; the output
        layer is the target's, and stays as it is

Row t holds the token at t + 1 and, fused by `fc`, the target's states at t. From it the layer predicts token t + 2.
To draft further it takes its own output at row t for the state of the next row, with the token that it just drafted.
Training does the same ("training-time test"): step s reads the token at t + 1 + s and the output of step s - 1, stands
at position t + s, and attends to the rows of real states up to t and to its own steps up to s. Tokens are the text's
own, as the target wrote them: behind a wrong draft nothing counts anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

DECAY = 0.8
"""Weight of the loss of step s is 0.8^s, as in the authors' code."""


class RMSNorm(nn.Module):
    """x / rms(x) · weight; Zhang and Sennrich, arXiv:1910.07467."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., width)."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """The four products of an attention whose input is twice as wide as its output."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2 * hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(2 * hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(2 * hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)


class GatedMLP(nn.Module):
    """W_down (SiLU(W_gate x) · W_up x)."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., hidden)."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """The decoder layer; the names of its parts are those of the checkpoints that servers read."""

    def __init__(self, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.self_attn = Attention(hidden, heads, kv_heads, head_dim)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = GatedMLP(hidden, intermediate)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a drafter.

    Attributes:
        hidden: Width of the layer and of the token embeddings.
        fused: Width of the target's states that `fc` reads, all depths one behind the other.
        intermediate: Width inside the MLP.
        heads, kv_heads, head_dim: Attention; `kv_heads` divides `heads`.
        drafted: Tokens that can be drafted.
        eps: Of the norms.
    """

    hidden: int
    fused: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    drafted: int
    eps: float


class Eagle3(nn.Module):
    """A drafter.

    Args:
        shape: Its sizes.
        embedding: (vocab, hidden): of all tokens; isn't trained.
        token_ids: (drafted,) int64, ascending: the token that each row of the output layer stands for.
        inverse_frequencies: (head_dim / 2,): of the rotary embedding, in radians per position.
        norm_before_residual: The layer's skip connection starts behind `hidden_norm`, not before it.
    """

    embedding: Tensor
    token_ids: Tensor
    inverse_frequencies: Tensor

    def __init__(
        self,
        shape: Shape,
        *,
        embedding: Tensor,
        token_ids: Tensor,
        inverse_frequencies: Tensor,
        norm_before_residual: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.norm_before_residual = norm_before_residual
        self.fc = nn.Linear(shape.fused, shape.hidden, bias=False)
        sizes = (shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim, shape.eps)
        self.layers = nn.ModuleList([Layer(*sizes)])
        self.norm = RMSNorm(shape.hidden, shape.eps)
        self.lm_head = nn.Linear(shape.hidden, shape.drafted, bias=False)
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.register_buffer("token_ids", token_ids, persistent=False)
        self.register_buffer("inverse_frequencies", inverse_frequencies, persistent=False)

    @property
    def layer(self) -> Layer:
        """The only decoder layer."""
        found: Layer = self.layers[0]  # type: ignore[assignment]  # torch types a list's members as modules
        return found

    def fused(self, states: Tensor) -> Tensor:
        """Return (..., hidden) from the target's states (..., fused)."""
        out: Tensor = self.fc(states)
        return out

    def inputs(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what attention reads, (..., 2 · hidden), and what is added to what it gives, (..., hidden)."""
        embedded = functional.embedding(tokens, self.embedding).to(hidden.dtype)
        normed = self.layer.hidden_norm(hidden)
        joined = torch.cat([self.layer.input_layernorm(embedded), normed], dim=-1)
        return joined, normed if self.norm_before_residual else hidden

    def keys(self, joined: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated keys and values, (..., rows, kv_heads, head_dim) each, of rows at positions (..., rows)."""
        attention = self.layer.self_attn
        keys, values = (
            product(joined).unflatten(-1, (self.shape.kv_heads, self.shape.head_dim))
            for product in (attention.k_proj, attention.v_proj)
        )
        return self.rotated(keys, positions), values

    def queries(self, joined: Tensor, positions: Tensor) -> Tensor:
        """Return rotated and scaled queries (..., rows, kv_heads, heads / kv_heads, head_dim)."""
        shape = self.shape
        found: Tensor = self.layer.self_attn.q_proj(joined)
        heads = found.view(*found.shape[:-1], shape.heads, shape.head_dim)
        turned: Tensor = self.rotated(heads, positions) * shape.head_dim**-0.5
        return turned.view(*found.shape[:-1], shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate (..., rows, heads, head_dim) by its positions (..., rows); Su et al., arXiv:2104.09864."""
        angles = positions[..., None, None] * self.inverse_frequencies
        cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

    def outputs(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Return the layer's output (..., hidden) from what was attended to, (..., heads · head_dim)."""
        hidden = residual + self.layer.self_attn.o_proj(attended)
        out: Tensor = hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (..., drafted) from the layer's output (..., hidden)."""
        out: Tensor = self.lm_head(self.norm(hidden))
        return out


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Texts to learn from, padded behind.

    Attributes:
        tokens: (b, n) int64: prompts and what the target wrote to them.
        states: (b, n, fused): what the target's states were there.
        rows: (b, a) int64: rows that drafts start from: t where the token at t + 1 is the target's.
        counts: (b,) int64: how many of `rows` are no padding.
    """

    tokens: Tensor
    states: Tensor
    rows: Tensor
    counts: Tensor

    def at(self, ahead: int) -> Tensor:
        """Return the tokens (b, a) so many places behind each row; the last one where the text is over."""
        return self.tokens.gather(1, (self.rows + ahead).clamp(max=self.tokens.shape[1] - 1))

    def counted(self, step: int) -> Tensor:
        """Return (b, a) bool: rows whose text still has the token that a step predicts, the one at t + 2 + step."""
        number = torch.arange(self.rows.shape[1], device=self.rows.device)
        return number[None] + step + 1 < self.counts[:, None]


def unrolled(drafter: Eagle3, batch: Batch, steps: int) -> list[Tensor]:
    """Return the outputs (b, a, hidden) of each step of the training-time test, before the final norm."""
    fused = drafter.fused(batch.states[:, :-1])  # the last token is nobody's row
    joined, residual = drafter.inputs(batch.tokens[:, 1:], fused)
    places = torch.arange(joined.shape[1], device=joined.device)
    keys, values = drafter.keys(joined, places[None])
    rows = batch.rows.clamp(max=joined.shape[1] - 1)
    seen = places[None, None] <= rows[..., None]  # (b, a, n - 1)
    joined, residual = (each.gather(1, rows[..., None].expand(-1, -1, each.shape[-1])) for each in (joined, residual))
    own: list[tuple[Tensor, Tensor]] = []
    found: list[Tensor] = []
    for step in range(steps):
        if step:
            joined, residual = drafter.inputs(batch.at(1 + step), found[-1])
            own.append(drafter.keys(joined, rows + step))
        queries = drafter.queries(joined, rows + step)
        found.append(drafter.outputs(_attended(queries, keys, values, seen, own), residual))
    return found


def _attended(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, own: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attend to real rows up to each query's, and to its own steps so far; return (b, a, heads · head_dim).

    Args:
        queries: (b, a, kv_heads, group, head_dim), scaled.
        keys: (b, n, kv_heads, head_dim) of real rows.
        values: Likewise.
        seen: (b, a, n) bool.
        own: Keys and values (b, a, kv_heads, head_dim) of each step after the first.
    """
    scores = torch.einsum("bakgd,bnkd->bakgn", queries, keys)
    scores = scores.masked_fill(~seen[:, :, None, None], float("-inf"))
    beside = [torch.einsum("bakgd,bakd->bakg", queries, each)[..., None] for each, _ in own]
    shares = torch.cat([scores, *beside], dim=-1).softmax(-1)
    real = keys.shape[1]
    found = torch.einsum("bakgn,bnkd->bakgd", shares[..., :real], values)
    for number, (_, each) in enumerate(own):
        found = found + shares[..., real + number, None] * each[:, :, :, None]
    return found.flatten(2)


def loss(drafter: Eagle3, batch: Batch, wanted: Tensor, steps: int, *, decay: float = DECAY) -> Tensor:
    """Return the cross-entropy from what the target predicts, over the draft vocabulary, in nats per drafted token.

    A prediction counts only where the target's choice can be drafted.

    Args:
        drafter: To train.
        batch: Texts.
        wanted: (b, a + steps, drafted): the target's logits that predict the token at t + 2 and the ones behind it, for
            the first row and on; what stands for padding doesn't matter.
        steps: Steps to unroll.
        decay: Of the weight of later steps.
    """
    draftable = torch.isin(batch.tokens, drafter.token_ids)
    total = wanted.new_zeros(())
    length = batch.rows.shape[1]
    for step, hidden in enumerate(unrolled(drafter, batch, steps)):
        counted = batch.counted(step) & draftable.gather(1, _within(batch, step + 2))
        aim = wanted[:, step : step + length][counted].softmax(-1)
        found = drafter.logits(hidden[counted]).log_softmax(-1)
        total = total - decay**step * (aim * found).sum() / max(1, int(counted.sum()))
    return total / sum(decay**step for step in range(steps))


def _within(batch: Batch, ahead: int) -> Tensor:
    return (batch.rows + ahead).clamp(max=batch.tokens.shape[1] - 1)


@torch.no_grad()
def right(drafter: Eagle3, batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
    """Return (how many rows each step counts, how many of them are right with all steps before them), (steps,) each."""
    counts, kept = [], []
    chain = torch.ones_like(batch.rows, dtype=torch.bool)
    for step, hidden in enumerate(unrolled(drafter, batch, steps)):
        best = drafter.token_ids[drafter.logits(hidden).argmax(-1)]
        counted = batch.counted(step)
        chain = chain & counted & (best == batch.at(step + 2))
        counts.append(counted.sum())
        kept.append(chain.sum())
    return torch.stack(counts), torch.stack(kept)
