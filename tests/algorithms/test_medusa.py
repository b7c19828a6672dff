"""Medusa heads: against the formulas written out, and against what a head must be able to learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optikit.algorithms import medusa
from optikit.algorithms.medusa import IGNORED, MedusaHeads, make_before, make_targets

VOCAB, HIDDEN, WIDTH = 16, 24, 10


def build(seed=0, **options):
    torch.manual_seed(seed)
    return MedusaHeads(torch.randn(VOCAB, HIDDEN), **{"heads": 3, **options})


def shaken(**options):
    """Heads whose weights are not zero any more."""
    heads = build(**options)
    with torch.no_grad():
        for each in (*heads.blocks.parameters(), *heads.inputs.parameters()):
            each.normal_(0, 0.3)
    return heads


def table(size=0.02):
    """Input embeddings, of another width than the states and as small as some models have them."""
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(5)) * size


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("embedding", [None, table()], ids=["parallel", "sequential"])
def test_new_heads_repeat_the_models_own(shared, layers, embedding):
    heads = build(shared=shared, layers=layers, embedding=embedding)
    hidden, before = torch.randn(5, HIDDEN), torch.randint(0, VOCAB, (5, 3))
    own = hidden @ heads.outputs[0].T
    for head in range(3):
        assert torch.equal(heads(hidden, before)[:, head], own)


@pytest.mark.parametrize("shared", [True, False])
def test_heads_compute_what_the_paper_writes(shared):
    heads = shaken(layers=2, shared=shared)
    hidden = torch.randn(5, HIDDEN)
    for k, blocks in enumerate(heads.blocks):
        x = hidden
        for block in blocks:
            x = x + nn.functional.silu(x @ block.linear.weight.T + block.linear.bias)
        expected = x @ heads.outputs[0 if shared else k].T
        torch.testing.assert_close(heads(hidden)[:, k], expected)
    first, second = heads.blocks[0]
    assert not torch.equal(first.linear.weight, second.linear.weight)


@pytest.mark.parametrize("size", [0.02, 5.0])
@pytest.mark.parametrize("shared", [True, False])
def test_sequential_heads_compute_what_is_written(shared, size):
    """One position, one head and one token at a time."""
    embedding = table(size)
    unit = embedding / embedding.square().mean().sqrt()
    heads = shaken(layers=2, shared=shared, embedding=embedding)
    hidden, before = torch.randn(5, HIDDEN), torch.randint(0, VOCAB, (5, 3))
    found = heads(hidden, before)
    for t in range(5):
        for k in range(3):
            first, second = (block.linear for block in heads.blocks[k])
            beside, inside = torch.zeros(HIDDEN), first.bias.clone()
            for j in range(k + 1):
                both = heads.inputs[k].weight[:, j * WIDTH : (j + 1) * WIDTH] @ unit[before[t, j]]
                beside += both[:HIDDEN]
                inside += both[HIDDEN:]
            x = hidden[t] + beside + nn.functional.silu(first.weight @ hidden[t] + inside)
            x = x + nn.functional.silu(second.weight @ x + second.bias)
            torch.testing.assert_close(found[t, k], heads.outputs[0 if shared else k] @ x)


def test_a_sequential_head_sees_no_token_that_is_drafted_after_it():
    heads = shaken(embedding=table())
    hidden, before = torch.randn(1, HIDDEN), torch.zeros(1, 3, dtype=torch.int64)
    first = heads(hidden, before)[0]
    for place in range(3):
        changed = before.clone()
        changed[0, place] = 7
        differs = (heads(hidden, changed)[0] != first).any(-1)
        assert differs.tolist() == [head >= place for head in range(3)]


@pytest.mark.parametrize("token_ids", [None, torch.tensor([1, 4, 9, 11])])
def test_sequential_heads_guess_behind_their_own_drafts(token_ids):
    heads = shaken(embedding=table(), token_ids=token_ids)
    hidden, newest = torch.randn(6, HIDDEN), torch.randint(0, VOCAB, (6,))
    tokens, probs = heads.guess(hidden, newest)
    for t in range(6):
        text = [int(newest[t])]
        for k in range(3):
            best = heads.logits(k, hidden[t : t + 1], torch.tensor([text]))[0].softmax(0).max(0)
            text.append(int(best.indices if token_ids is None else token_ids[best.indices]))
            assert float(probs[t, k]) == pytest.approx(float(best.values.detach()), rel=1e-5)
        assert tokens[t].tolist() == text[1:]


def test_sequential_heads_do_not_guess_what_came_before():
    heads = build(embedding=table())
    with pytest.raises(ValueError, match="need the tokens before them"):
        heads(torch.randn(2, HIDDEN))
    with pytest.raises(ValueError, match="have no embeddings"):
        build().embedded(torch.tensor([1]))


def test_shared_heads_do_not_train_the_output_layer():
    assert {name for name, each in build().named_parameters() if not each.requires_grad} == {"outputs.0"}
    assert all(each.requires_grad for each in build(shared=False).parameters())
    assert len(build(shared=False).outputs) == 3


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    heads=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_targets_equal_the_obvious_loop(lengths, heads, seed):
    rng = np.random.default_rng(seed)
    documents = np.repeat(np.arange(len(lengths)), lengths)
    tokens = rng.integers(0, VOCAB, len(documents))
    wanted = rng.random(len(documents)) < 0.7
    found = make_targets(*map(torch.from_numpy, (tokens, documents, wanted)), heads)
    before = make_before(torch.from_numpy(tokens), heads)
    assert before.shape == found.shape
    for t in range(len(tokens)):
        for k in range(heads):
            ahead = t + 2 + k
            right = ahead < len(tokens) and documents[ahead] == documents[t] and wanted[ahead]
            assert found[t, k] == (tokens[ahead] if right else IGNORED)
            assert not right or before[t, : k + 1].tolist() == tokens[t + 1 : ahead].tolist()


@pytest.mark.parametrize("token_ids", [None, torch.tensor([1, 4, 9, 11])])
def test_losses_are_weighted_cross_entropies(token_ids):
    heads = shaken(shared=False, token_ids=token_ids)
    hidden = torch.randn(40, HIDDEN)
    targets = torch.randint(0, VOCAB, (40, 3))
    targets[::3, 0] = IGNORED
    for k, loss in enumerate(medusa.losses(heads, hidden, targets)):
        values = []
        for t in range(40):
            token = int(targets[t, k])
            if token == IGNORED or (token_ids is not None and token not in token_ids):
                continue
            row = token if token_ids is None else token_ids.tolist().index(token)
            values.append(-heads(hidden[t : t + 1])[0, k].log_softmax(-1)[row].item())
        assert float(loss.detach()) == pytest.approx(0.8 ** (k + 1) * np.mean(values), rel=1e-5)


@pytest.mark.parametrize("embedding", [None, table()], ids=["parallel", "sequential"])
def test_every_head_learns_from_its_own_loss_alone(embedding):
    heads = shaken(shared=False, embedding=embedding)
    hidden, targets, before = torch.randn(20, HIDDEN), *torch.randint(0, VOCAB, (2, 20, 3))
    for k, loss in enumerate(medusa.losses(heads, hidden, targets, before)):
        heads.zero_grad()
        loss.backward()
        norms = medusa.gradient_norms(heads)
        assert [norm > 0 for norm in norms] == [head == k for head in range(3)]
        own = {name: each.grad.square().sum() for name, each in heads.named_parameters() if each.grad is not None}
        mine = [square for name, square in own.items() if name.split(".")[1] == str(k)]
        assert norms[k] == pytest.approx(float(sum(mine)) ** 0.5, rel=1e-5)


def test_the_losses_of_sequential_heads_are_behind_true_tokens():
    heads = shaken(embedding=table())
    hidden, targets, before = torch.randn(20, HIDDEN), *torch.randint(0, VOCAB, (2, 20, 3))
    targets[::3, 1] = IGNORED
    for k, loss in enumerate(medusa.losses(heads, hidden, targets, before)):
        seen = [t for t in range(20) if targets[t, k] != IGNORED]
        scores = heads(hidden, before)[:, k].log_softmax(-1)
        expected = -np.mean([float(scores[t, targets[t, k]].detach()) for t in seen])
        assert float(loss.detach()) == pytest.approx(0.8 ** (k + 1) * expected, rel=1e-5)


def test_a_head_without_targets_costs_nothing():
    targets = torch.randint(0, VOCAB, (20, 3))
    targets[:, 2] = IGNORED
    *_, last = medusa.losses(build(), torch.randn(20, HIDDEN), targets)
    last.backward()
    assert float(last.detach()) == 0


def test_guesses_are_tokens_of_the_whole_vocabulary():
    token_ids = torch.tensor([1, 4, 9, 11])
    heads = shaken(token_ids=token_ids)
    hidden = torch.randn(6, HIDDEN)
    tokens, probs = heads.guess(hidden)
    best = heads(hidden).softmax(-1).max(-1)
    assert torch.equal(tokens, token_ids[best.indices])
    assert torch.equal(probs, best.values)
    assert heads.outputs[0].shape == (4, HIDDEN)


def test_accuracy_equals_the_obvious_count():
    heads = shaken(token_ids=torch.arange(0, VOCAB, 2))
    hidden = torch.randn(300, HIDDEN)
    targets = torch.randint(0, VOCAB, (300, 3))
    targets[::7, 1] = IGNORED
    known = [t for t in range(300) if t % 7]
    ranked = heads.token_ids[heads(hidden).sort(-1, descending=True).indices]
    right = np.array([[[int(ranked[t, k, r] == targets[t, k]) for r in range(5)] for k in range(3)] for t in known])
    found = medusa.accuracy(heads, hidden, targets, batch=64)
    assert found.positions == len(known)
    assert found.top1 == pytest.approx(right[:, :, 0].mean(0))
    assert found.top5 == pytest.approx(right.sum(-1).mean(0))
    assert found.chain == pytest.approx(right[:, :, 0].cumprod(1).mean(0))
    assert found.tokens_per_step == pytest.approx(1 + right[:, :, 0].cumprod(1).mean(0).sum())


def test_accuracy_of_nothing_is_zero():
    found = medusa.accuracy(build(), torch.zeros(4, HIDDEN), torch.full((4, 3), IGNORED))
    assert (found.positions, found.tokens_per_step) == (0, 1)


def test_the_draft_vocabulary_holds_the_most_frequent_tokens():
    tokens = torch.tensor([5, 5, 5, 9, 9, 2, 14])
    assert medusa.draft_vocabulary(tokens, 3, vocab=VOCAB).tolist() == [2, 5, 9]
    assert medusa.draft_vocabulary(tokens, 5, vocab=VOCAB).tolist() == [0, 2, 5, 9, 14]
    assert medusa.coverage(tokens, torch.tensor([5, 9])) == pytest.approx(5 / 7)


# ------------------------------------------------------------------------------------------------------------- training
