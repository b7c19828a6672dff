"""Medusa heads: small networks that guess, from one hidden state, the tokens after the next one.

Paper   Cai et al. 2024, arXiv:2401.10774, sections 2.1 and 2.2 (Medusa-1: the model itself stays as it is); heads that
        see the tokens drafted before them: Ankner et al. 2024, arXiv:2402.05109 (Hydra)
Cost    one (hidden, hidden) layer per head; the output layer costs more than all of it, so heads may share the model's,
        cut to the tokens that are worth drafting
Differs biases start at zero, too, so that a head begins as an exact copy of the model's own; targets never cross the
        border of a document; several layers per head are several, not one applied often; the skip connection
        around a sequential head's first layer keeps the state as it is, and what embeddings add to it starts at zero

The hidden state at position t is what the model's output head reads there, after the final norm. The model's own head
predicts token t + 1 from it, head k (from 0) token t + 2 + k. Sequential heads see the tokens between, too: head k
those from t + 1, which is known when heads are asked, to t + 1 + k, which the heads before it have drafted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

IGNORED = -100
"""Target of a position that a head doesn't learn from."""
DECAY = 0.8
"""λ_k = 0.8^k, k from 1: later heads guess worse and would drown the first (section 2.2.1)."""


class ResBlock(nn.Module):
    """x + SiLU(W x + b), zero at the start; with more to read, x + s + SiLU(W x + b + r).

    Args:
        hidden: Width.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        """Return (..., hidden) from x (..., hidden) and, if any, s and r as `more` (..., 2 · hidden)."""
        if more is None:
            return x + nn.functional.silu(self.linear(x))
        beside, inside = more.chunk(2, dim=-1)
        return x + beside + nn.functional.silu(self.linear(x) + inside)


def _to_unit(rows: Tensor) -> float:
    """Return the factor that gives rows a root mean square of 1."""
    norm = float(torch.linalg.vector_norm(rows.detach(), dtype=torch.float32))
    return rows.numel() ** 0.5 / norm if norm else 1.0


class MedusaHeads(nn.Module):
    """K heads over one hidden state and, if they are sequential, over the tokens drafted before each.

    A sequential head reads those tokens' embeddings in its first residual block, by a linear map that is zero at the
    start. They are scaled, all alike, to a root mean square of 1: models differ a lot in how small they are.

    Args:
        output: (vocab, hidden): rows of the model's output head.
        heads: K.
        layers: Residual blocks per head.
        shared: All heads read out through `output`, which isn't trained. Else each trains a copy of it.
        token_ids: (drafted,) int64, ascending: the tokens that heads can draft; None is the whole vocabulary.
        embedding: (vocab, width): the model's input embeddings, which aren't trained; makes the heads sequential.
    """

    token_ids: Tensor | None
    embedding: Tensor | None

    def __init__(
        self,
        output: Tensor,
        *,
        heads: int,
        layers: int = 1,
        shared: bool = True,
        token_ids: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.vocab, hidden = output.shape
        self.shared = shared
        self.blocks = nn.ModuleList(nn.Sequential(*(ResBlock(hidden) for _ in range(layers))) for _ in range(heads))
        rows = (output if token_ids is None else output[token_ids]).detach().float()
        copies = 1 if shared else heads
        self.outputs = nn.ParameterList(nn.Parameter(rows.clone(), requires_grad=not shared) for _ in range(copies))
        self.register_buffer("token_ids", token_ids)
        self.register_buffer("embedding", None if embedding is None else embedding.detach(), persistent=False)
        widths = [] if embedding is None else [embedding.shape[1] * (head + 1) for head in range(heads)]
        self.inputs = nn.ModuleList(nn.Linear(width, 2 * hidden, bias=False) for width in widths)
        for each in self.inputs.parameters():
            nn.init.zeros_(each)
        self.scale = 1.0 if embedding is None else _to_unit(embedding)

    @property
    def heads(self) -> int:
        """Number of heads."""
        return len(self.blocks)

    @property
    def sequential(self) -> bool:
        """Whether each head sees the tokens drafted before it."""
        return self.embedding is not None

    def linears(self, head: int) -> list[tuple[Tensor, Tensor]]:
        """Return weight (hidden, hidden) and bias (hidden,) of each residual layer of a head."""
        linears = [each for each in self.blocks[head].modules() if isinstance(each, nn.Linear)]
        return [(each.weight, each.bias) for each in linears]

    def embedded(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (..., width) of tokens, scaled as sequential heads see them.

        Raises:
            ValueError: The heads aren't sequential.
        """
        if self.embedding is None:
            raise ValueError("heads that aren't sequential have no embeddings")
        return nn.functional.embedding(tokens, self.embedding).float() * self.scale

    def logits(self, head: int, hidden: Tensor, before: Tensor | None = None) -> Tensor:
        """Return one head's logits.

        Args:
            head: Which.
            hidden: (n, hidden): states at positions t.
            before: (n, head + 1 or more): the tokens at t + 1, t + 2 …; sequential heads need them.

        Returns:
            (n, drafted).

        Raises:
            ValueError: A sequential head without the tokens before it.
        """
        more = None
        if self.sequential:
            if before is None:
                raise ValueError("sequential heads need the tokens before them")
            more = self.inputs[head](self.embedded(before[:, : head + 1]).flatten(1))
        for block in self.blocks[head].children():
            hidden, more = block(hidden, more), None
        return nn.functional.linear(hidden, self.outputs[0 if self.shared else head])

    def forward(self, hidden: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the logits (n, heads, drafted) of all heads from states (n, hidden), tokens before (n, heads)."""
        return torch.stack([self.logits(head, hidden, before) for head in range(self.heads)], dim=1)

    def to_output_rows(self, targets: Tensor) -> Tensor:
        """Return the row of the output layers that stands for each token, `IGNORED` where none does."""
        if self.token_ids is None:
            return targets
        row = torch.full((self.vocab,), IGNORED, dtype=torch.int64, device=targets.device)
        row[self.token_ids] = torch.arange(len(self.token_ids), device=targets.device)
        return torch.where(targets == IGNORED, IGNORED, row[targets.clamp(min=0)])

    @torch.inference_mode()
    def guess(self, hidden: Tensor, newest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return each head's likeliest token and its probability, both (n, heads).

        Args:
            hidden: (n, hidden): states at positions t.
            newest: (n,): the tokens at t + 1, after which sequential heads go on, each with what those before it
                found likeliest; other heads don't look at them.
        """
        tokens = hidden.new_empty((len(hidden), 0), dtype=torch.int64) if newest is None else newest[:, None]
        probs = []
        for head in range(self.heads):
            best = self.logits(head, hidden, tokens).softmax(-1).max(-1)
            found = best.indices if self.token_ids is None else self.token_ids[best.indices]
            tokens = torch.cat([tokens, found[:, None]], dim=1)
            probs.append(best.values)
        return tokens[:, -self.heads :], torch.stack(probs, dim=1)


def make_targets(tokens: Tensor, documents: Tensor, wanted: Tensor, heads: int) -> Tensor:
    """Return the token that each head is to predict at each position.

    Args:
        tokens: (n,) int64, documents one after the other.
        documents: (n,) number of the document that each token belongs to.
        wanted: (n,) bool: tokens that the model wrote itself; prompts aren't worth predicting.
        heads: K.

    Returns:
        (n, K) int64: token t + 2 + k, `IGNORED` where it belongs to another document or isn't wanted.
    """
    out = torch.full((len(tokens), heads), IGNORED, dtype=torch.int64)
    for head in range(heads):
        ahead = head + 2
        same = (documents[:-ahead] == documents[ahead:]) & wanted[ahead:]
        out[: len(same), head] = torch.where(same, tokens[ahead:], IGNORED)
    return out


def make_before(tokens: Tensor, heads: int) -> Tensor:
    """Return the token right before each of `make_targets`, (n, K): token t + 1 + k; the last one where there is none.

    Args:
        tokens: (n,) int64, n ≥ 1: as there. A target lies in its position's document, and so does what is before it.
        heads: K.
    """
    places = torch.arange(len(tokens))[:, None] + torch.arange(1, heads + 1)
    return tokens[places.clamp(max=len(tokens) - 1)]


def losses(
    heads: MedusaHeads, hidden: Tensor, targets: Tensor, before: Tensor | None = None, *, decay: float = DECAY
) -> Iterator[Tensor]:
    """Yield λ_k · cross-entropy of each head, one at a time: the logits of one head are large enough.

    Args:
        heads: The heads.
        hidden: (n, hidden).
        targets: (n, heads) from `make_targets`.
        before: (n, heads) from `make_before`: sequential heads learn behind true tokens.
        decay: λ_k = decay^k, k from 1.

    Yields:
        A scalar per head; 0, with a gradient of 0, where a head has nothing to learn from.
    """
    rows = heads.to_output_rows(targets)
    for head in range(heads.heads):
        seen = rows[:, head] != IGNORED
        logits = heads.logits(head, hidden[seen], None if before is None else before[seen]).float()
        total = nn.functional.cross_entropy(logits, rows[seen, head], reduction="sum")
        yield decay ** (head + 1) * total / seen.sum().clamp(min=1)


def gradient_norms(heads: MedusaHeads) -> tuple[float, ...]:
    """Return the norm of each head's gradient: 0 means that a head isn't learning (as in Liger-Kernel issue 325)."""
    norms = []
    for head, block in enumerate(heads.blocks):
        own = [*block.parameters(), *([] if heads.shared else [heads.outputs[head]])]
        own += heads.inputs[head].parameters() if heads.sequential else []
        squares = [each.grad.square().sum() for each in own if each.grad is not None]
        norms.append(float(torch.stack(squares).sum().sqrt()) if squares else 0.0)
    return tuple(norms)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How well heads guess, over positions whose K targets are all known.

    Attributes:
        top1: Share of positions at which each head's likeliest token is right; sequential heads are asked behind true
            tokens, wherever those before them were wrong.
        top5: Share at which the right token is among the five likeliest.
        chain: Share at which heads 0 … k are all right: what a chain of drafts accepts.
        positions: Number of positions.
    """

    top1: tuple[float, ...]
    top5: tuple[float, ...]
    chain: tuple[float, ...]
    positions: int

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens of a step that drafts with all heads: 1 + Σ chain."""
        return 1 + sum(self.chain)


@torch.inference_mode()
def accuracy(
    heads: MedusaHeads, hidden: Tensor, targets: Tensor, before: Tensor | None = None, *, batch: int = 1024
) -> Accuracy:
    """Measure heads; tokens outside the draft vocabulary count as wrong.

    Args:
        heads: The heads.
        hidden: (n, hidden).
        targets: (n, heads) from `make_targets`.
        before: (n, heads) from `make_before`, for sequential heads.
        batch: Positions at once.
    """
    known = torch.nonzero((targets != IGNORED).all(dim=1)).flatten()
    output = heads.outputs[0]
    top = min(5, len(output))
    hits = []
    for part in torch.split(known, batch):
        rows = heads.to_output_rows(targets[part].to(output.device))
        seen = None if before is None else before[part].to(output.device)
        best = heads(hidden[part].to(output.device).float(), seen).topk(top, dim=-1).indices
        hits.append((best == rows[..., None]).cpu())
    found = torch.cat(hits) if hits else torch.zeros(0, heads.heads, top, dtype=torch.bool)
    first = found[..., 0]
    share = [first, found.any(-1), first.cumprod(1)]
    top1, top5, chain = (tuple(each.double().mean(0).nan_to_num().tolist()) for each in share)
    return Accuracy(top1=top1, top5=top5, chain=chain, positions=len(known))


def coverage(tokens: Sequence[int] | Tensor, token_ids: Tensor) -> float:
    """Return the share of tokens that a draft vocabulary holds: an upper bound of every head's accuracy."""
    return float(torch.isin(torch.as_tensor(tokens), token_ids).double().mean())


def draft_vocabulary(tokens: Tensor, size: int, *, vocab: int) -> Tensor:
    """Return the `size` most frequent tokens (size,) int64, ascending; ties and unseen ones by id.

    Args:
        tokens: (n,) int64: what the model wrote.
        size: Tokens wanted, at most `vocab`.
        vocab: Size of the whole vocabulary.
    """
    counts = torch.bincount(tokens, minlength=vocab)
    order = torch.sort(counts, descending=True, stable=True).indices
    return order[:size].sort().values
