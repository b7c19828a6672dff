"""The loop by itself: budgets, schedule, best weights, bad numbers, checkpoints, random numbers, TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optikit.errors import StageFailedError
from optikit.stage import Job
from optikit.training.loop import History, Settings, Task, train

LOOP = Settings(budget=("steps", 6), batch=2, learning_rate=0.1)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop catches it."""


def toy(size: int = 8192) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))


def job(scratch: Path, **changes: Any) -> Job:
    scratch.mkdir(parents=True, exist_ok=True)
    return Job(source=scratch, dest=scratch, scratch=scratch, **changes)


def task(parameter: nn.Parameter, loss: Callable[[int], Tensor], **changes: Any) -> Task:
    """Return a task of twelve items, each with a loss of its own."""

    def step(items: Tensor) -> Iterator[Tensor]:
        return (loss(int(item)) / len(items) for item in items)

    return Task(
        **{"parameters": {"w": parameter}, "items": torch.arange(12), "step": step, "shuffled": False} | changes
    )


@pytest.mark.parametrize(
    ("budget", "steps"),
    [(("steps", 7), 7), (("epochs", 3), 9), (("tokens", 1), 1), (("tokens", 399), 9), (("tokens", 400), 10)],
)
def test_a_budget_becomes_steps(budget, steps, tmp_path):
    """Ten items of ten tokens in batches of four: three steps an epoch, forty tokens a step."""
    chosen = Settings(budget=budget, batch=4, learning_rate=0.1)
    assert chosen.steps(10, 10) == steps
    seen: list[int] = []
    parameter = toy(4)

    def loss(item: int) -> Tensor:
        seen.append(item)
        return parameter.sum()

    given = task(parameter, loss, items=torch.arange(10), item_tokens=10)
    assert train(given, chosen, job(tmp_path)).steps == steps
    assert seen == [item for step in range(steps) for item in range(10)[step % 3 * 4 : step % 3 * 4 + 4]]


def test_shuffled_epochs_visit_every_item_in_an_order_of_their_own(tmp_path):
    def order(seed: int, name: str) -> list[int]:
        seen: list[int] = []
        parameter = toy(4)

        def loss(item: int) -> Tensor:
            seen.append(item)
            return parameter.sum()

        settings = replace(LOOP, budget=("epochs", 3))
        train(task(parameter, loss, shuffled=True), settings, job(tmp_path / name, seed=seed))
        return seen

    first, other = order(0, "a"), order(1, "b")
    epochs = [first[start : start + 12] for start in (0, 12, 24)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert len(set(map(tuple, epochs))) == 3
    assert first == order(0, "c") != other


@pytest.mark.parametrize(("warmup", "rising"), [(0.1, 10), (0.105, 11), (40.0, 40), (0.0, 0)])
def test_the_rate_rises_then_falls_to_a_tenth(warmup, rising, tmp_path):
    parameter = toy(4)
    settings = Settings(budget=("steps", 100), batch=1, learning_rate=2.0, warmup=warmup)
    rates = train(task(parameter, lambda _: parameter.sum()), settings, job(tmp_path)).log["learning_rate"]
    for step, found in enumerate(rates):
        share = (step + 1) / rising if step < rising else 0.0
        fall = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising + 1) / (100 - rising)))
        assert found == pytest.approx(2 * (share or fall))
    assert rates[-1] == pytest.approx(0.2)
    constant = replace(settings, schedule="constant")
    again = train(task(parameter, lambda _: parameter.sum()), constant, job(tmp_path / "constant"))
    rates = again.log["learning_rate"]
    assert rates[:rising] == pytest.approx([2.0 * (step + 1) / rising for step in range(rising)])
    assert rates[rising:] == pytest.approx([2.0] * (100 - rising))


def test_some_parameters_may_learn_faster(tmp_path):
    """AdamW's first step moves every element by the learning rate, whatever its gradient."""
    slow, fast = toy(64), toy(64)
    before = slow.detach().clone()
    once = Settings(budget=("steps", 1), batch=1, learning_rate=0.01, warmup=0, schedule="constant")
    given = task(slow, lambda _: (slow + 5 * fast).pow(2).mean(), parameters={"a": slow, "b": fast}, faster={"b": 4.0})
    train(given, once, job(tmp_path))
    torch.testing.assert_close((slow - before).abs(), torch.full((64,), 0.01), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close((fast - before).abs(), torch.full((64,), 0.04), rtol=1e-3, atol=1e-5)


def test_pruned_weights_stay_zero(tmp_path):
    parameter = toy(64)
    pruned = torch.arange(64) % 2 == 0
    train(task(parameter, lambda _: (parameter - 3).pow(2).mean(), pruned={"w": pruned}), LOOP, job(tmp_path))
    assert (parameter[pruned] == 0).all()
    assert (parameter[~pruned] != 0).all()


# ------------------------------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_ends_training_with_the_weights_before_it(bad, tmp_path):
    def run(parameter: nn.Parameter, worst: int, name: str, progress: Callable[..., None] = lambda *_: None) -> History:
        given = task(parameter, lambda item: (parameter * (bad if item == worst else 1)).pow(2).mean())
        return train(given, LOOP, job(tmp_path / name, progress=progress))

    stopped, short = toy(), toy()
    history = run(stopped, 7, "a")
    assert history.steps == 3
    assert str(bad) in history.stopped
    assert history.stopped.endswith("at step 3")
    seen: list[Tensor] = []
    run(short, -1, "b", lambda *_: seen.append(short.detach().clone()))
    assert torch.equal(stopped, seen[2])
    with pytest.raises(StageFailedError, match=r"training met loss .* at step 0, before there were any good weights"):
        run(toy(), 1, "c")


def test_a_bad_gradient_behind_a_good_loss_is_noticed(tmp_path):
    parameter = nn.Parameter(torch.zeros(4))
    given = task(parameter, lambda _: (parameter * parameter).sum().sqrt())  # 0, and its slope there is 0 / 0
    with pytest.raises(StageFailedError, match=r"loss 0\.0 with a gradient of norm nan at step 0"):
        train(given, LOOP, job(tmp_path))


# ------------------------------------------------------------------------------------------------ the best validation


def wandering(parameter: nn.Parameter, scores: list[float]) -> Task:
    """Return a task that is told these scores, one after the other, of weights that always move."""
    told = iter(scores)
    return task(
        parameter, lambda _: parameter.sum(), validate=lambda: {"score": next(told), "of": float(parameter.detach()[0])}
    )


BEST = Settings(budget=("epochs", 5), batch=12, learning_rate=0.1, keep="best", patience=2)


@pytest.mark.parametrize(
    ("scores", "best", "epochs", "stopped"),
    [
        ([1, 2, 3, 4, 5, 6], 5, 5, ""),
        ([1, 3, 2, 3, 9, 9], 1, 3, "patience"),
        ([5, 4, 3, 9, 9, 9], 0, 2, "patience"),
        ([5, 5, 5, 5, 9, 9], 1, 3, "patience"),
        ([1, math.nan, 2, math.nan, 3, math.nan], 4, 5, ""),
    ],
)
def test_the_weights_that_validated_best_remain(scores, best, epochs, stopped, tmp_path):
    parameter = toy(4)
    history = train(wandering(parameter, scores), BEST, job(tmp_path))
    assert (history.best, len(history.epoch_losses), history.stopped) == (best, epochs, stopped)
    assert float(parameter.detach()[0]) == history.validation[best]["of"]
    assert len({each["of"] for each in history.validation}) == epochs + 1
    assert history.summary()["stopped"] == (stopped or "budget")


def test_the_last_weights_remain_if_they_are_asked_for(tmp_path):
    parameter = toy(4)
    history = train(
        wandering(parameter, [3, 2, 1, 0, -1, -2]), replace(BEST, keep="last", patience=None), job(tmp_path)
    )
    assert float(parameter.detach()[0]) == history.validation[-1]["of"] != history.validation[0]["of"]


# --------------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_loop_resumes_at_every_step_to_the_same_weights(optimizer, tmp_path):
    """Every step draws random numbers, too; the best weights are those of an epoch before the last."""
    settings = replace(LOOP, budget=("epochs", 2), weight_decay=0.1, optimizer=optimizer, keep="best", patience=None)

    def run(parameter: nn.Parameter, name: str, last: int = 0) -> History:
        def progress(done: int, total: int, what: str) -> None:
            if done == last:
                raise Killed

        def loss(item: int) -> Tensor:
            return (parameter - item - torch.rand(())).abs().pow(1.5).mean()

        def validate() -> dict[str, float]:
            return {"score": -abs(float(parameter.detach().mean()) - 0.4)}

        given = task(parameter, loss, validate=validate, shuffled=True)
        return train(given, settings, job(tmp_path / name, progress=progress, seed=3))

    whole = toy()
    history = run(whole, "whole")
    assert history.best == 1
    for last in range(1, 13):
        with pytest.raises(Killed):
            run(toy(), f"{last}", last)
        resumed = toy()
        assert run(resumed, f"{last}") == history
        assert torch.equal(resumed, whole)


def test_a_checkpoint_that_was_cut_off_is_never_read(tmp_path):
    parameter = toy()
    given = task(parameter, lambda _: parameter.pow(2).mean())
    (tmp_path / "training.part").write_bytes(b"half of a checkpoint")
    history = train(given, LOOP, job(tmp_path))
    assert history.steps == 6
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_file()) == ["training.pt", "training.pt.sha256"]


@pytest.mark.parametrize("size", [0, 0.5, 1])
def test_a_damaged_checkpoint_is_told_and_trained_again(tmp_path, size):
    """Emptied, cut in half, and with one bit flipped: the training begins again, and ends with the same bytes."""

    def run(**told) -> torch.Tensor:
        parameter = toy()
        train(task(parameter, lambda _: parameter.pow(2).mean()), LOOP, job(tmp_path, **told))
        return parameter.detach()

    whole = run()
    path = tmp_path / "training.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content[: int(len(content) * size)])
    notes: list[str] = []
    assert torch.equal(run(note=notes.append), whole)
    assert notes == ["training.pt, kept of an earlier run of this step, is damaged: what it held is made again"]
    run(note=notes.append)
    assert len(notes) == 1


# -------------------------------------------------------------------------------------------------------- what is told


def test_tensorboard_holds_every_number_of_every_step_once(tmp_path):
    """Steps of a killed run that its successor does again are purged."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = Settings(budget=("steps", 60), batch=2, learning_rate=0.1)

    def run(last: int) -> History:
        def progress(done: int, total: int, what: str) -> None:
            if done == last:
                raise Killed

        parameter = toy(4)
        given = task(parameter, lambda _: parameter.pow(2).mean(), gradients=lambda _: {"more": 7.0})
        return train(given, settings, job(tmp_path, progress=progress))

    with pytest.raises(Killed):
        run(29)  # the last checkpoint is of step 27
    history = run(0)
    board = EventAccumulator(str(tmp_path / "tensorboard" / "training"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["gradient_norm", "learning_rate", "loss", "more"]
    for name, values in history.log.items():
        events = board.Scalars(name)
        assert [event.step for event in events] == list(range(60))
        assert [event.value for event in events] == pytest.approx(values, rel=1e-6)
    assert [row["loss"] for row in history.rows()] == history.losses
