"""Recovery by training: it recovers, keeps zeros, stops at bad numbers, resumes to the same bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from optikit import targets
from optikit.algorithms.losses import cross_entropy
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint
from optikit.models.reader import read
from optikit.stages.finetune import full
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
    for moment in (("texts by the teacher", 16), ("training step", 3)):

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


def test_text_that_is_too_short_for_a_window_is_refused(teacher, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    with pytest.raises(StageFailedError, match="fewer than one calibration window"):
        perform("finetune", "full", teacher, tmp_path, short, **EIGHT)


def test_the_log_is_one_line_per_step(teacher, text, tmp_path):
    found = perform("finetune", "full", teacher, tmp_path, text, **EIGHT)
    lines = [json.loads(line) for line in (tmp_path / "model" / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(found["steps"]))
    assert [round(line["loss"], 4) for line in lines] == found["losses"]


@pytest.mark.parametrize(("options", "steps"), [({"steps": 3}, 3), ({"epochs": 2}, 4), ({"tokens": 1}, 1)])
def test_a_budget_is_given_in_steps_epochs_or_tokens(options, steps, teacher, text, tmp_path):
    """The recipe's six samples are an epoch of two steps of four windows."""
    found = perform("finetune", "full", teacher, tmp_path, text, batch=4, **options)
    assert found["steps"] == steps
    assert found["tokens"] == steps * 4 * LENGTH


def test_two_budgets_are_refused():
    with pytest.raises(ValidationError, match="give one of tokens, steps, epochs, not steps and epochs"):
        full.Options(steps=3, epochs=2)


def test_a_longer_training_is_planned_to_take_more(teacher):
    facts, target = read(teacher), targets.find("cpu")

    def seconds(**options: int) -> float:
        return full.estimate(full.Options(**options), facts, target, 384).seconds

    assert seconds() == seconds(tokens=100_000)
    assert seconds(steps=1000) > seconds(steps=10)
    assert seconds(epochs=1000) > seconds(epochs=10)
