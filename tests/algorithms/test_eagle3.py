"""EAGLE-3's training-time test, against drafting row by row as the decoding loop does it, and against guessing."""

import math

import pytest
import torch
from torch.nn import functional

from optikit.algorithms.eagle3 import Batch, Eagle3, Shape, loss, right, unrolled

VOCAB, STEPS = 50, 3
SHAPE = Shape(hidden=16, fused=36, intermediate=24, heads=4, kv_heads=2, head_dim=8, drafted=20, eps=1e-5)


def build(*, norm_before_residual=False):
    torch.manual_seed(0)
    drafter = Eagle3(
        SHAPE,
        embedding=torch.randn(VOCAB, SHAPE.hidden),
        token_ids=torch.arange(0, 40, 2),
        inverse_frequencies=torch.tensor([1.0, 0.3, 0.1, 0.03]),
        norm_before_residual=norm_before_residual,
    )
    for each in drafter.parameters():
        torch.nn.init.normal_(each, 1.0 if each.dim() == 1 else 0.0, 0.2)
    return drafter


def batch_of(lengths=((5, 6), (9, 2), (3, 4))):
    """Texts of (prompt, answer) tokens, padded behind."""
    generator = torch.Generator().manual_seed(1)
    longest, answers = max(map(sum, lengths)), max(answer for _, answer in lengths)
    rows = torch.tensor([[prompt - 1 + i for i in range(answers)] for prompt, _ in lengths])
    return Batch(
        tokens=torch.randint(0, VOCAB, (len(lengths), longest), generator=generator),
        states=torch.randn(len(lengths), longest, SHAPE.fused, generator=generator),
        rows=rows,
        counts=torch.tensor([answer for _, answer in lengths]),
    )


def rotate(vector, position, frequencies):
    """One head's vector, pair by pair, as complex numbers."""
    half = len(vector) // 2
    turned = torch.complex(vector[:half], vector[half:]) * torch.exp(1j * position * frequencies)
    return torch.cat([turned.real, turned.imag])


def norm(x, weight):
    return x / (x.square().mean() + SHAPE.eps).sqrt() * weight


class Slow:
    """The drafter for one text, a row at a time, with a list for a cache."""

    def __init__(self, drafter):
        self.drafter, self.weights = drafter, dict(drafter.layer.state_dict())
        self.cache = []

    def row(self, token, hidden, position):
        w, shape = self.weights, SHAPE
        normed = norm(hidden, w["hidden_norm.weight"])
        x = torch.cat([norm(self.drafter.embedding[token], w["input_layernorm.weight"]), normed])
        q, k, v = ((w[f"self_attn.{name}_proj.weight"] @ x).split(shape.head_dim) for name in "qkv")
        turn = self.drafter.inverse_frequencies
        self.cache.append(([rotate(each, position, turn) for each in k], v))
        heads = []
        for head, query in enumerate(q):
            mine = head // (shape.heads // shape.kv_heads)
            turned = rotate(query, position, turn)
            scores = torch.stack([turned @ keys[mine] for keys, _ in self.cache]) / math.sqrt(shape.head_dim)
            heads.append(
                sum(share * values[mine] for share, (_, values) in zip(scores.softmax(0), self.cache, strict=True))
            )
        residual = normed if self.drafter.norm_before_residual else hidden
        out = residual + w["self_attn.o_proj.weight"] @ torch.cat(heads)
        inner = norm(out, w["post_attention_layernorm.weight"])
        gated = functional.silu(w["mlp.gate_proj.weight"] @ inner) * (w["mlp.up_proj.weight"] @ inner)
        return out + w["mlp.down_proj.weight"] @ gated


def drafted(drafter, tokens, states, row, steps):
    """Outputs of each step from a row on: real rows first, then the drafter's own."""
    slow = Slow(drafter)
    for t in range(row + 1):
        out = slow.row(int(tokens[t + 1]), drafter.fc.weight @ states[t], t)
    found = [out]
    for step in range(1, steps):
        found.append(slow.row(int(tokens[row + 1 + step]), found[-1], row + step))
    return found


@pytest.mark.parametrize("before", [False, True])
@torch.no_grad()
def test_unrolling_is_drafting_row_by_row(before):
    drafter, batch = build(norm_before_residual=before), batch_of()
    outputs = unrolled(drafter, batch, STEPS)
    for text, count in enumerate(batch.counts.tolist()):
        for i in range(count):
            row = int(batch.rows[text, i])
            steps = min(STEPS, count - i)
            expected = drafted(drafter, batch.tokens[text], batch.states[text], row, steps)
            for step in range(steps):
                torch.testing.assert_close(outputs[step][text, i], expected[step], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_counts_and_loss_are_those_of_a_loop():
    drafter, batch = build(), batch_of()
    wanted = torch.randn(3, 6 + STEPS, SHAPE.drafted)
    outputs = unrolled(drafter, batch, STEPS)
    total, counts, kept = 0.0, [0] * STEPS, [0] * STEPS
    for step in range(STEPS):
        terms = []
        for text, count in enumerate(batch.counts.tolist()):
            for i in range(count - step - 1):  # what the step predicts is in the answer
                counts[step] += 1
                token = int(batch.tokens[text, int(batch.rows[text, i]) + 2 + step])
                chain = [
                    int(drafter.token_ids[drafter.logits(outputs[s][text, i]).argmax()])
                    == int(batch.tokens[text, int(batch.rows[text, i]) + 2 + s])
                    for s in range(step + 1)
                ]
                kept[step] += all(chain)
                if token in drafter.token_ids:
                    aim = wanted[text, i + step].softmax(0)
                    terms.append(-(aim * drafter.logits(outputs[step][text, i]).log_softmax(0)).sum())
        total += 0.8**step * float(torch.stack(terms).mean())
    assert float(loss(drafter, batch, wanted, STEPS)) == pytest.approx(total / (1 + 0.8 + 0.64), rel=1e-5)
    seen, chains = right(drafter, batch, STEPS)
    assert seen.tolist() == counts
    assert chains.tolist() == kept


def test_padding_and_prompts_teach_nothing():
    drafter, batch = build(), batch_of()
    wanted = torch.randn(3, 6 + STEPS, SHAPE.drafted)
    first = loss(drafter, batch, wanted, STEPS)
    tokens, states = batch.tokens.clone(), batch.states.clone()
    tokens[1, 11:], states[1, 11:] = 3, 100.0  # behind the second text
    changed = Batch(tokens=tokens, states=states, rows=batch.rows, counts=batch.counts)
    assert torch.equal(loss(drafter, changed, wanted, STEPS), first)
    states[0, 10] = 100.0  # the last token's: no row reads it
    assert torch.equal(loss(drafter, changed, wanted, STEPS), first)


def test_it_learns_a_rule_that_guessing_the_commonest_token_does_not():
    """The next token is the one before the last, plus two: readable from the tokens alone."""
    drafter = build()
    tokens = torch.zeros(8, 30, dtype=torch.int64)
    tokens[:, :2] = torch.randint(0, 20, (8, 2), generator=torch.Generator().manual_seed(2)) * 2
    for t in range(2, 30):
        tokens[:, t] = (tokens[:, t - 2] + 2) % 40
    states = functional.one_hot(tokens % SHAPE.fused, SHAPE.fused).float()
    rows = torch.arange(4, 29).expand(8, -1)
    batch = Batch(tokens=tokens, states=states, rows=rows, counts=torch.full((8,), 25))
    wanted = torch.full((8, 25 + STEPS, SHAPE.drafted), -20.0)
    for j in range(25 + STEPS):
        wanted[range(8), j, tokens[:, min(6 + j, 29)] // 2] = 20.0
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss(drafter, batch, wanted, STEPS).backward()
        optimizer.step()
    seen, kept = right(drafter, batch, STEPS)
    commonest = float(tokens[:, 6:].flatten().bincount().max()) / tokens[:, 6:].numel()
    assert float(kept[0] / seen[0]) > max(0.8, 4 * commonest)
    assert float(kept[2] / seen[2]) > 0.6
