"""Every kind of training goes through the one loop: it resumes to the same bytes and logs every step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from optikit import stages
from optikit.stage import Calibration, Job
from tests.conftest import build_tiny_llama

LENGTH = 48


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A stage that trains.

    Attributes:
        stage: Verb and method.
        options: Small ones.
        steps: Steps that they mean.
        boards: Names of its trainings.
    """

    stage: tuple[str, str]
    options: dict[str, Any]
    steps: int
    boards: tuple[str, ...] = field(default=("training",))


SHORT = {"steps": 4, "batch": 2, "learning_rate": 1e-2}
WRITTEN = {"new_tokens": 48, "eval_prompts": 8}
HEADS = WRITTEN | {"heads": 2, "tokens": 1200, "steps": 5, "draft_vocab": 64}
KINDS = {
    "lora": Kind(stage=("finetune", "lora"), options=SHORT, steps=4),
    "lora-8bit": Kind(stage=("finetune", "lora"), options=SHORT | {"optimizer": "adamw8bit"}, steps=4),
    "full": Kind(stage=("finetune", "full"), options=SHORT, steps=4),
    "distill": Kind(stage=("finetune", "distill"), options=SHORT, steps=4),
    "medusa2": Kind(
        stage=("finetune", "medusa2"),
        options=SHORT | {"heads": 2, "rank": 4},
        steps=4,
        boards=("training", "training-alone"),
    ),
    "heads": Kind(stage=("speculate", "medusa"), options=HEADS, steps=5),
    "heads-constant": Kind(
        stage=("speculate", "medusa"),
        options=HEADS | {"heads": 5, "schedule": "constant", "learning_rate": 1e-4, "optimizer": "adamw8bit"},
        steps=5,
    ),
    "sequential-heads": Kind(stage=("speculate", "medusa"), options=HEADS | {"sequential": True}, steps=5),
    "eagle3": Kind(
        stage=("speculate", "eagle3"),
        options=WRITTEN | {"tokens": 1200, "steps": 5, "unroll": 2, "draft_vocab": 64},
        steps=5,
    ),
    "draft": Kind(
        stage=("speculate", "draft"),
        options=WRITTEN | {"make": {"layers": 2, "tokens": 1200, "steps": 5}, "precision": "fp32"},
        steps=5,
    ),
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in a stage catches it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, another one to learn from, text, and prompts."""
    place = tmp_path_factory.mktemp("given")
    build_tiny_llama(place / "source", layers=4)
    build_tiny_llama(place / "teacher", layers=5)
    (place / "text.txt").write_text("An old stone lies under the green river, and cold water runs. " * 80)
    lines = [json.dumps({"prompt": f"{word} {number}"}) for number in range(12) for word in ("one", "sea", "cat")]
    (place / "prompts.jsonl").write_text("\n".join(lines))
    return place


def perform(kind: Kind, given: Path, work: Path, kill_at: int = 0) -> dict[str, Any]:
    """Run a stage in a folder, killed after so many training steps, if any."""

    def progress(done: int, total: int, what: str) -> None:
        if (done, what) == (kill_at, "training step"):
            raise Killed

    for name in ("dest", "scratch"):
        (work / name).mkdir(parents=True, exist_ok=True)
    stage = stages.load(*kind.stage)
    job = Job(
        source=given / "source",
        dest=work / "dest",
        scratch=work / "scratch",
        inputs={"teacher": given / "teacher", "prompts": given / "prompts.jsonl"},
        calibration=Calibration(text=given / "text.txt", samples=6, length=LENGTH),
        progress=progress,
    )
    return stage.run(stage.Options(**kind.options), job)


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_two_runs_and_a_killed_one_end_with_the_same_bytes(kind, place, tmp_path):
    pytest.importorskip("peft")
    facts = perform(kind, place, tmp_path / "whole")
    wanted = digests(tmp_path / "whole" / "dest")
    assert perform(kind, place, tmp_path / "again") == facts
    assert digests(tmp_path / "again" / "dest") == wanted
    with pytest.raises(Killed):
        perform(kind, place, tmp_path / "killed", kill_at=3)
    assert digests(tmp_path / "killed" / "dest") == {}
    assert perform(kind, place, tmp_path / "killed") == facts
    assert digests(tmp_path / "killed" / "dest") == wanted

    log = [json.loads(line) for line in (tmp_path / "whole" / "dest" / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(kind.steps))
    assert all(line["learning_rate"] > 0 and line["gradient_norm"] > 0 for line in log)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_tensorboard_is_told_every_step(kind, place, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    perform(kind, place, tmp_path)
    folder = tmp_path / "scratch" / "tensorboard"
    assert sorted(each.name for each in folder.iterdir()) == sorted(kind.boards)
    told = 0
    for name in kind.boards:
        board = EventAccumulator(str(folder / name))
        board.Reload()
        assert {"loss", "learning_rate", "gradient_norm", "validation"} <= set(board.Tags()["scalars"])
        told += len(board.Scalars("loss"))
    assert told == kind.steps
