"""Recovery by training: it recovers, keeps zeros, stops at bad numbers, resumes to the same bytes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from optikit import targets
from optikit.algorithms.losses import cross_entropy, divergence
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint
from optikit.models.reader import read
from optikit.training.loop import Settings, rate, train
from tests.stages.finetune.conftest import LENGTH, Killed, digests, perform

EIGHT = {"batch": 4, "tokens": 8 * 4 * LENGTH, "learning_rate": 3e-3}


def sentences(seed: int, count: int) -> str:
    """Return text with something to learn: every second word follows from the one before it."""
    draw = random.Random(seed)
    pairs = ["old stone", "green river", "cold water", "bright window", "small house", "under light"]
    return "\n".join(" ".join(draw.choice(pairs) for _ in range(6)) + "." for _ in range(count))


def loss_on(directory: Path, text: str) -> float:
    """Return the mean loss on a text that nothing was trained on."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return float(sum(cross_entropy(model(input_ids=window).logits, window) for window in windows.split(1))) / len(
            windows
        )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sentences(0, 400), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, text) -> Path:
    """A tiny Llama that has learned the text: made by the stage that is tested."""
    from tests.conftest import build_tiny_llama

    place = tmp_path_factory.mktemp("teacher")
    source = build_tiny_llama(place / "random", layers=4)
    options = {"embeddings": True, "tokens": 48 * 4 * LENGTH, "learning_rate": 1e-2}
    found = perform("finetune", "full", source, place, text, **options)
    assert found["held_out_loss_after"] < 0.6 * found["held_out_loss_before"]
    assert found["losses"][-1] < 0.6 * found["losses"][0]
    assert (found["steps"], found["stopped"]) == (48, "")
    return place / "model"


@pytest.fixture(scope="module")
def shortened(tmp_path_factory, teacher, text) -> Path:
    place = tmp_path_factory.mktemp("shortened")
    perform("prune", "depth", teacher, place, text, ratio=0.5)
    return place / "model"


@pytest.mark.parametrize(
    ("method", "options"), [("full", {}), ("distill", {}), ("lora", {"learning_rate": 1e-2, "rank": 8})]
)
def test_it_recovers_what_depth_pruning_lost(method, options, teacher, shortened, text, tmp_path):
    unseen = sentences(1, 25)
    found = perform("finetune", method, shortened, tmp_path, text, teacher=teacher, **{**EIGHT, **options})
    assert found["held_out_loss_after"] < found["held_out_loss_before"]
    whole, without, recovered = (loss_on(each, unseen) for each in (teacher, shortened, tmp_path / "model"))
    assert whole < without
    assert recovered < without - 0.3 * (without - whole)
    assert len((tmp_path / "model" / "training.jsonl").read_text().splitlines()) == found["steps"] == 8


def test_killed_while_the_teacher_writes_the_bytes_are_the_same(teacher, shortened, text, tmp_path):
    options = {"teacher": teacher, "text": "own", "tokens": 16 * 40, "batch": 4, "length": 40}

    whole = perform("finetune", "distill", shortened, tmp_path / "whole", text, **options)
    for moment in (("texts by the teacher", 16), ("step", 3)):

        def kill(done: int, total: int, what: str, moment: tuple[str, int] = moment) -> None:
            if (what, done) == moment:
                raise Killed

        with pytest.raises(Killed):
            perform("finetune", "distill", shortened, tmp_path / "killed", text, progress=kill, **options)
        assert list((tmp_path / "killed" / "model").iterdir()) == []
    assert perform("finetune", "distill", shortened, tmp_path / "killed", text, **options) == whole
    assert digests(tmp_path / "killed" / "model") == digests(tmp_path / "whole" / "model")


@pytest.mark.parametrize("method", ["full", "distill", "lora"])
def test_zeros_stay_zeros(method, teacher, text, tmp_path):
    perform("prune", "magnitude", teacher, tmp_path / "sparse", text, pattern="2:4")
    source, trained = tmp_path / "sparse" / "model", tmp_path / "trained" / "model"
    found = perform("finetune", method, source, tmp_path / "trained", text, teacher=teacher, **EIGHT)
    before, after = Checkpoint(source), Checkpoint(trained)
    linears = [f"{name}.weight" for name in read(source).linears]
    assert found["zeros_kept"] >= sum(int((before.read(name) == 0).sum()) for name in linears)
    for name in linears:
        pruned, weight = before.read(name) == 0, after.read(name)
        assert (weight[pruned] == 0).all()
        assert not torch.equal(weight, before.read(name))


def test_lora_after_zeros_is_refused_when_planning(teacher):
    from optikit.rules import Placed, Stack, check

    facts = read(teacher).having("sparse_2_4")
    placed = Placed(verb="finetune", method="lora", backend="optikit", options={}, before=facts, after=facts)
    target = targets.find("cpu")
    assert target is not None
    assert "prune-lora-fills-zeros" in [p.code for p in check(Stack(stages=(placed,), target=target, model=facts))]


# ---------------------------------------------------------------- the loop by itself


def toy(size: int = 8192) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))


WINDOWS = torch.arange(12).reshape(12, 1)
LOOP = Settings(steps=6, batch=2, learning_rate=0.1)


def test_a_bad_number_ends_training_with_the_weights_before_it(tmp_path):
    def loss(parameter: nn.Parameter, bad: int):
        return lambda window: (parameter * (math.nan if int(window) == bad else 1)).pow(2).mean()

    stopped, short = toy(), toy()
    history = train({"w": stopped}, WINDOWS, loss(stopped, 7), LOOP, checkpoint=tmp_path / "a.pt")
    assert len(history.losses) == 3
    assert "nan" in history.stopped
    assert "step 3" in history.stopped
    seen = []

    def observe(told):
        seen.append(short.detach().clone())

    train({"w": short}, WINDOWS, loss(short, -1), LOOP, checkpoint=tmp_path / "b.pt", observe=observe)
    assert torch.equal(stopped, seen[2])
    with pytest.raises(StageFailedError, match="step 0"):
        train({"w": toy()}, WINDOWS, loss(toy(), 1), LOOP, checkpoint=tmp_path / "c.pt")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_loop_resumes_at_every_step_to_the_same_weights(optimizer, tmp_path):
    settings = Settings(steps=6, batch=2, learning_rate=0.1, weight_decay=0.1, optimizer=optimizer)

    def run(parameter, name, last=6):
        def observe(told):
            if told["step"] == last:
                raise Killed

        def loss(window):
            return (parameter - window).abs().pow(1.5).mean()

        return train({"w": parameter}, WINDOWS, loss, settings, checkpoint=tmp_path / name, observe=observe)

    whole = toy()
    history = run(whole, "whole.pt")
    for last in range(5):
        with pytest.raises(Killed):
            run(toy(), f"{last}.pt", last)
        resumed = toy()
        assert run(resumed, f"{last}.pt") == history
        assert torch.equal(resumed, whole)


def test_some_parameters_may_learn_faster(tmp_path):
    """AdamW's first step moves every element by the learning rate, whatever its gradient."""
    slow, fast = toy(64), toy(64)
    before = slow.detach().clone()
    once = Settings(steps=1, batch=1, learning_rate=0.01, warmup=0)

    def loss(_):
        return (slow + 5 * fast).pow(2).mean()

    train({"a": slow, "b": fast}, WINDOWS, loss, once, checkpoint=tmp_path / "x.pt", faster={"b": 4.0})
    torch.testing.assert_close((slow - before).abs(), torch.full((64,), 0.01), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close((fast - before).abs(), torch.full((64,), 0.04), rtol=1e-3, atol=1e-5)


def test_divergence_is_that_of_the_definition():
    student, teacher = torch.randn(2, 1, 5, 11, generator=torch.Generator().manual_seed(0)).unbind()
    for temperature in (1.0, 2.0):
        p, q = ((each[0] / temperature).softmax(-1).double() for each in (teacher, student))
        expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
        assert float(divergence(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence(teacher, teacher, 1.0)) == pytest.approx(0, abs=1e-7)


def test_the_rate_rises_then_falls_to_a_tenth():
    settings = Settings(steps=100, batch=1, learning_rate=1.0, warmup=0.1)
    rates = [rate(step, settings) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_text_that_is_too_short_for_a_window_is_refused(teacher, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    with pytest.raises(StageFailedError, match="fewer than one calibration window"):
        perform("finetune", "full", teacher, tmp_path, short, **EIGHT)


def test_a_board_is_written_where_tensorboard_is_installed(teacher, text, tmp_path):
    pytest.importorskip("tensorboard")
    perform("finetune", "full", teacher, tmp_path, text, **EIGHT)
    assert list((tmp_path / "scratch" / "tensorboard").iterdir())


def test_the_log_is_one_line_per_step(teacher, text, tmp_path):
    found = perform("finetune", "full", teacher, tmp_path, text, **EIGHT)
    lines = [json.loads(line) for line in (tmp_path / "model" / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(found["steps"]))
    assert [round(line["loss"], 4) for line in lines] == found["losses"]
