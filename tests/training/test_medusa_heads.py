"""Training Medusa heads: they learn what can be known, the best remain, a killed training ends with the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from optikit.algorithms import medusa
from optikit.algorithms.medusa import IGNORED, MedusaHeads, make_before, make_targets
from optikit.errors import StageFailedError
from optikit.stage import Job
from optikit.training.loop import Settings
from optikit.training.medusa_heads import Rows, train_heads

VOCAB, HIDDEN, WIDTH = 16, 24, 10


def table(size=0.02):
    """Input embeddings, of another width than the states and as small as some models have them."""
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(5)) * size


def job(scratch: Path, **changes) -> Job:
    scratch.mkdir(exist_ok=True)
    return Job(source=scratch, dest=scratch, scratch=scratch, **changes)


def lesson(seed=0, count=1500, noise=0.1):
    """A noisy walk along a fixed cycle of tokens; the state is a random vector of the newest token."""
    rng = np.random.default_rng(seed)
    cycle = np.random.default_rng(99).permutation(VOCAB)
    follows = np.empty(VOCAB, np.int64)
    follows[cycle] = np.roll(cycle, -1)
    tokens = [0]
    for _ in range(count - 1):
        tokens.append(int(rng.integers(VOCAB)) if rng.random() < noise else int(follows[tokens[-1]]))
    tokens = torch.tensor(tokens)
    states = torch.from_numpy(np.random.default_rng(98).normal(0, 1, (VOCAB, HIDDEN)).astype(np.float32))
    output = torch.zeros(VOCAB, HIDDEN)
    output[torch.from_numpy(follows)] = 4 * torch.linalg.pinv(states).T  # the model's own head: the next token
    documents = torch.arange(count) // 50
    targets = make_targets(tokens, documents, torch.ones(count, dtype=torch.bool), 3)
    return output, Rows(hidden=states[tokens].to(torch.bfloat16), targets=targets, before=make_before(tokens, 3))


QUICK = Settings(budget=("epochs", 6), batch=64, learning_rate=5e-3, warmup=5, keep="best", patience=2)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("shared", [True, False])
def test_heads_learn_what_can_be_known(tmp_path, shared, optimizer):
    output, rows = lesson()
    _, validation = lesson(seed=1)
    heads = MedusaHeads(output, heads=3, shared=shared)
    before = medusa.accuracy(heads, validation.hidden, validation.targets)
    chosen = replace(QUICK, budget=("epochs", 12), optimizer=optimizer)
    history = train_heads(heads, rows, validation, chosen, job(tmp_path))
    after = medusa.accuracy(heads, validation.hidden, validation.targets)
    ceiling = [0.906**2, 0.906**3, 0.906**4]  # the walk itself: nine in ten steps, and a sixteenth of the tenth
    for k in range(3):
        assert before.top1[k] < 0.3
        assert after.top1[k] > ceiling[k] - 0.07
    assert history.validation[history.best]["top1"] == list(after.top1)
    assert history.epoch_losses[-1] < history.epoch_losses[0]
    assert all(history.log[f"gradient_norm_{head}"][0] > 0 for head in range(3))


def test_heads_that_see_drafts_guess_what_depends_on_them(tmp_path):
    """Three in ten tokens are a surprise: from the state alone they add up, behind known tokens they don't."""
    output, rows = lesson(count=3000, noise=0.3)
    _, validation = lesson(seed=1, noise=0.3)
    chosen = replace(QUICK, budget=("epochs", 8))
    found = {}
    for name, embedding in (("parallel", None), ("sequential", table())):
        heads = MedusaHeads(output, heads=3, embedding=embedding)
        history = train_heads(heads, rows, validation, chosen, job(tmp_path / name))
        found[name] = history.validation[history.best]
    sure = 0.7 + 0.3 / VOCAB
    for k in range(3):
        assert found["parallel"]["top1"][k] < sure ** (k + 2) + 0.07
        assert found["sequential"]["top1"][k] > sure - 0.07
        assert found["sequential"]["chain"][k] > sure ** (k + 1) - 0.07
    assert found["sequential"]["tokens_per_step"] > found["parallel"]["tokens_per_step"] + 0.2


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 20, 24, 50, 130])
def test_a_killed_training_ends_with_the_same_heads(tmp_path, after):
    output, rows = lesson()
    _, validation = lesson(seed=1)
    whole = MedusaHeads(output, heads=3)
    expected = train_heads(whole, rows, validation, QUICK, job(tmp_path / "whole"))
    assert expected.steps > 130

    def kill(done, total, what):
        if done == after:
            raise _KilledError

    with pytest.raises(_KilledError):
        train_heads(MedusaHeads(output, heads=3), rows, validation, QUICK, job(tmp_path / "killed", progress=kill))
    again = MedusaHeads(output, heads=3)
    steps = []
    found = train_heads(
        again, rows, validation, QUICK, job(tmp_path / "killed", progress=lambda done, *_: steps.append(done))
    )
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert len(steps) <= expected.steps - after // 6 * 6  # a checkpoint every sixth step
    finished = MedusaHeads(output, heads=3)
    assert train_heads(finished, rows, validation, QUICK, job(tmp_path / "killed")) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), finished.parameters(), strict=True))


def test_a_killed_training_of_sequential_heads_ends_with_the_same(tmp_path):
    output, rows = lesson(count=400)
    whole, again = (MedusaHeads(output, heads=3, embedding=table()) for _ in range(2))
    expected = train_heads(whole, rows, rows, QUICK, job(tmp_path / "whole"))

    def kill(done, total, what):
        if done == 17:
            raise _KilledError

    with pytest.raises(_KilledError):
        train_heads(again, rows, rows, QUICK, job(tmp_path / "killed", progress=kill))
    again = MedusaHeads(output, heads=3, embedding=table())
    assert train_heads(again, rows, rows, QUICK, job(tmp_path / "killed")) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert all(each.abs().max() > 0 for each in again.inputs.parameters())


def test_bad_numbers_end_training_with_the_last_good_heads(tmp_path):
    output, rows = lesson()
    _, validation = lesson(seed=1)
    heads = MedusaHeads(output, heads=3)

    def spoil(done, total, what):
        if done == 31:  # in the second epoch
            rows.hidden[100] = float("nan")

    history = train_heads(heads, rows, validation, QUICK, job(tmp_path, progress=spoil))
    assert history.stopped.startswith("loss nan with a gradient of norm nan at step")
    assert len(history.epoch_losses) in (1, 2)
    assert all(each.isfinite().all() for each in heads.parameters())
    kept = medusa.accuracy(heads, validation.hidden, validation.targets)
    assert list(kept.chain) == history.validation[history.best]["chain"]


def test_bad_numbers_from_the_start_fail(tmp_path):
    output, rows = lesson()
    rows.hidden[:] = float("inf")
    with pytest.raises(StageFailedError, match="before there were any good weights"):
        train_heads(MedusaHeads(output, heads=3), rows, rows, QUICK, job(tmp_path))


def test_a_head_that_is_cut_off_is_noticed(tmp_path):
    output, rows = lesson()
    heads = MedusaHeads(output, heads=3)
    heads.blocks[1].requires_grad_(requires_grad=False)
    with pytest.raises(StageFailedError, match="head 1 gets no gradient"):
        train_heads(heads, rows, rows, QUICK, job(tmp_path))


def test_training_ends_when_validation_stalls(tmp_path):
    output, rows = lesson()
    never = Rows(hidden=rows.hidden[:60], targets=torch.randint(0, VOCAB, (60, 3)))
    chosen = replace(QUICK, budget=("epochs", 50), batch=512, learning_rate=1e-6, warmup=0)
    heads = MedusaHeads(output, heads=3)
    history = train_heads(heads, rows, never, chosen, job(tmp_path))
    assert history.stopped == "patience"
    assert len(history.epoch_losses) == history.best + 2 < 50


@pytest.mark.parametrize("empty", ["learn from", "validate on"])
def test_nothing_to_learn_from_is_said(tmp_path, empty):
    output, rows = lesson(count=200)
    nothing = Rows(hidden=rows.hidden, targets=torch.full_like(rows.targets, IGNORED))
    pair = (nothing, rows) if empty == "learn from" else (rows, nothing)
    with pytest.raises(StageFailedError, match=f"nothing to {empty}"):
        train_heads(MedusaHeads(output, heads=3), *pair, QUICK, job(tmp_path))
