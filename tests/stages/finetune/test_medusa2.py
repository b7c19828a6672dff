"""Joint training: hidden states tell more than a frozen model's, at little cost to the model; heads wait beside it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optikit import targets
from optikit.algorithms.medusa import MedusaHeads
from optikit.errors import IntegrityError, StageFailedError
from optikit.formats.checkpoint import locate, read_entry
from optikit.formats.medusa import HEADS_START, start
from optikit.models.reader import read
from optikit.stage import Calibration, Job
from optikit.stages.finetune import medusa2
from optikit.training.loop import Settings
from tests.stages.finetune.conftest import Killed, digests, perform

LENGTH = 96
FEW: dict[str, Any] = {"heads": 2, "rank": 4, "batch": 2, "tokens": 4 * 2 * 48, "length": 48}
"""Four steps."""


def runs(seed: int, count: int) -> str:
    """Return text in which a letter comes every third place: "a..a..a..a..c..c..c..".

    At the first point, the next byte is a point whatever the letter is: a model that predicts one byte has no reason
    to carry the letter there, and the byte after the next can't be read off its states.
    """
    draw = random.Random(seed)
    out = ""
    while len(out) < count:
        out += (draw.choice("abcdefghijklmnop") + "..") * draw.randint(5, 9)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(runs(0, 40_000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A tiny Llama that has learned to predict such text."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from tests.conftest import build_tiny_llama

    place = build_tiny_llama(tmp_path_factory.mktemp("reader"))
    tokens = torch.tensor(Tokenizer.from_file(str(place / "tokenizer.json")).encode(runs(1, 40_000)).ids)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        batch = torch.stack(
            [tokens[i : i + 64] for i in torch.randint(0, len(tokens) - 64, (16,), generator=generator)]
        )
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(place)
    return place


def course(source: Path, text: Path, place: Path, alone: float) -> dict[str, Any]:
    """Train for 60 steps, so many of them on heads alone."""
    from optikit.training.finetune import adapted
    from optikit.training.joint_medusa import Course, train_jointly

    for name in ("model", "scratch"):
        (place / name).mkdir(parents=True, exist_ok=True)
    calibration = Calibration(text=text, samples=1, length=LENGTH)
    job = Job(source=source, dest=place / "model", scratch=place / "scratch", calibration=calibration)
    given = Course(heads=2, layers=1, alone=alone, faster=1.0, weight=1.0, own=True)
    return train_jointly(
        job, adapted(job, rank=8, alpha=16), Settings(budget=("steps", 60), batch=2, learning_rate=1e-2), given
    )


def test_states_of_a_model_that_learned_with_its_heads_tell_more(reader, text, tmp_path):
    """Against heads that learned from as many tokens on the model as it was."""
    frozen, both = course(reader, text, tmp_path / "frozen", 1.0), course(reader, text, tmp_path / "both", 0.25)
    assert (frozen["steps_alone"], both["steps_alone"]) == (59, 15)
    untrained, alone, together = frozen["heads"]["untrained"], frozen["heads"]["alone"], both["heads"]["together"]
    assert untrained["top1"][0] < 0.45
    assert alone["top1"][0] > untrained["top1"][0] + 0.2
    assert alone["top1"][0] < 0.72  # the points, two thirds of all, and no letters
    assert together["top1"][0] > alone["top1"][0] + 0.08
    assert together["top1"][1] > alone["top1"][1] + 0.05
    assert together["tokens_per_step"] > alone["tokens_per_step"] + 0.15
    assert both["held_out_loss_after"] < both["held_out_loss_before"] + 0.12
    assert 0 < both["held_out_divergence"] < 0.12


@pytest.fixture(scope="module")
def made(tiny_llama, text, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("made")
    return place, perform("finetune", "medusa2", tiny_llama, place, text, **FEW)


def test_it_says_what_became_of_both(made, tiny_llama):
    place, facts = made
    assert (facts["steps"], facts["steps_alone"], facts["stopped"]) == (4, 2, "")
    assert facts["tokens"] == 4 * 2 * 48
    assert set(facts["heads"]) == {"untrained", "alone", "together"}
    assert 0 < facts["tensors_changed"] <= len(read(tiny_llama).linears)
    log = [json.loads(line) for line in (place / "model" / "training.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"]) for line in log] == [*enumerate(["alone"] * 2 + ["together"] * 2)]


def test_later_heads_start_from_those_that_fit(made, tiny_llama):
    directory = made[0] / "model"
    output = torch.randn(260, 64)
    heads = MedusaHeads(output, heads=2)
    assert start(heads, directory) == ""
    stored = {name: read_entry(entry) for name, entry in locate(directory / HEADS_START).items()}
    for head in range(2):
        ((weight, bias),) = heads.linears(head)
        assert torch.equal(weight, stored[f"{head}.0.weight"])
        assert torch.equal(bias, stored[f"{head}.0.bias"])
        assert weight.any()
    for others in ({"heads": 3}, {"heads": 2, "layers": 2}):
        untouched = MedusaHeads(output, **others)
        assert start(untouched, directory) == "they are 2 of 1 layers and width 64"
        assert not any(each.any() for each in untouched.blocks.parameters())
    assert start(MedusaHeads(torch.randn(260, 32), heads=2), directory) == "they are 2 of 1 layers and width 64"
    assert start(heads, tiny_llama) == "there are none"


@pytest.mark.parametrize("options", [{"aim": "text"}, {"text": "own"}, {"alone": 0.0}, {"layers": 2}])
def test_it_may_be_told_otherwise(options, made, tiny_llama, text, tmp_path):
    facts = perform("finetune", "medusa2", tiny_llama, tmp_path, text, **{**FEW, **options})
    assert facts["steps"] == 4
    assert facts["heads"]["untrained"]["positions"] > 0
    assert digests(tmp_path / "model") != digests(made[0] / "model")


def test_killed_when_both_learn_from_its_own_words_the_bytes_are_the_same(tiny_llama, text, tmp_path):
    options = {**FEW, "text": "own"}
    whole = perform("finetune", "medusa2", tiny_llama, tmp_path / "whole", text, **options)

    def kill(done: int, total: int, what: str) -> None:
        if (done, what) == (3, "training step"):
            raise Killed

    with pytest.raises(Killed):
        perform("finetune", "medusa2", tiny_llama, tmp_path / "killed", text, progress=kill, **options)
    assert perform("finetune", "medusa2", tiny_llama, tmp_path / "killed", text, **options) == whole
    assert digests(tmp_path / "killed" / "model") == digests(tmp_path / "whole" / "model")


@pytest.fixture(scope="module")
def fragile(tiny_llama, tmp_path_factory) -> tuple[Path, Path]:
    """(a model that is broken where it reads a "Z", a text that has them in the fourth window to train on)."""
    import shutil

    place = tmp_path_factory.mktemp("fragile") / "model"
    shutil.copytree(tiny_llama, place)
    tensors = load_file(place / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    broken = json.loads((place / "tokenizer.json").read_text())["model"]["vocab"]["Z"]
    tensors["model.embed_tokens.weight"][broken] = torch.nan
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    # Windows come from as many equal parts of the text, and those to train on are shuffled.
    fourth = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()[3]
    part = (12_000 - 47) / (8 + 4)
    begin, end = round(fourth * part) + 48, round((fourth + 1) * part)
    whole = runs(0, 12_000)[:12_000]
    text = place.parent / "text.txt"
    text.write_text(whole[:begin] + "Z" * (end - begin) + whole[end:], encoding="utf-8")
    return place, text


def test_a_model_whose_embedding_is_not_finite_is_not_written(fragile, tmp_path):
    source, text = fragile
    with pytest.raises(IntegrityError, match=r"model\.embed_tokens\.weight holds NaN or infinity"):
        perform("finetune", "medusa2", source, tmp_path, text, **{**FEW, "alone": 0.0})


def test_a_bad_number_before_the_model_is_trained_fails(fragile, tmp_path):
    source, text = fragile
    with pytest.raises(StageFailedError, match="while they learned alone: the model is as it was"):
        perform("finetune", "medusa2", source, tmp_path, text, **{**FEW, "alone": 0.75})


@pytest.mark.parametrize(("options", "weight"), [({}, 0.01), ({"aim": "text"}, 0.2), ({"heads_weight": 0.5}, 0.5)])
def test_the_weight_of_the_heads_follows_from_the_aim(options, weight):
    assert medusa2.Options(**options).weight() == weight


def test_more_heads_and_aims_are_planned_to_take_more(tiny_llama):
    facts, target = read(tiny_llama), targets.find("cpu")

    def seconds(**options: Any) -> float:
        return medusa2.estimate(medusa2.Options(**options), facts, target, 4096).seconds

    assert seconds(heads=5) > seconds()
    assert seconds(alone=0.9) < seconds()
    assert seconds(aim="text") < seconds()
    assert seconds(text="own") > seconds()


def test_a_missing_library_is_said_when_planning(tiny_llama, monkeypatch):
    monkeypatch.setattr(medusa2, "find_spec", lambda _: None)
    found = list(medusa2.check(medusa2.Options(), read(tiny_llama), targets.find("cpu")))
    assert [problem.code for problem in found] == ["library-missing"]
