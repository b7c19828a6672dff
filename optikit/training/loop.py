"""The one training loop: everything that learns by gradient steps goes through it.

A caller says what is trained, on what, and towards what (`Task`), and how long and how fast (`Settings`). The loop
orders the items, steps the optimizer, validates, keeps the best weights, writes checkpoints, logs every step, and stops
at the first bad number. A killed run's successor goes on behind the last checkpoint and ends with the same bytes: the
order of an epoch and the random numbers of a step depend on the seed and their number only.

Papers: AdamW, Loshchilov and Hutter, arXiv:1711.05101; 8-bit moments, Dettmers et al., arXiv:2110.02861; the warm-up
and the cosine are transformers' `cosine_warmup_with_min_lr`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from optikit.errors import StageFailedError
from optikit.fileio import is_intact, keep_checked
from optikit.stage import Job

CHECKPOINTS = 20
"""Checkpoints of one training, those behind epochs aside: a killed run loses at most a twentieth."""
TENSORBOARD = "tensorboard"
"""Folder in scratch with a log for TensorBoard, if that is installed."""
LOG = "training.jsonl"
"""Left in the artifact: a line of JSON per step."""

Validation = Mapping[str, Any]
"""What `Task.validate` found, as JSON: `score`, higher is better, and whatever else is told about it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        budget: How much: optimizer steps, passes over all items, or tokens, in whole steps, at least one.
        batch: Items per step.
        learning_rate: After the warm-up.
        schedule: `cosine`: down to a tenth of the learning rate at the end. `constant`: not at all.
        warmup: Below 1 a share of all steps, else their number; the rate rises linearly meanwhile.
        weight_decay: AdamW's.
        clip: Largest norm of a step's gradient; larger ones are scaled down to it.
        optimizer: `adamw8bit` keeps its moments in 8 bits.
        patience: Epochs without a better validation after which training ends; None never ends it.
        keep: Which weights remain: those that validated best, the untrained start among them, or the last.
    """

    budget: tuple[Literal["steps", "epochs", "tokens"], int]
    batch: int
    learning_rate: float
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    patience: int | None = None
    keep: Literal["best", "last"] = "last"

    def steps(self, items: int, item_tokens: int = 1) -> int:
        """Return the optimizer steps of the budget.

        Args:
            items: Items of an epoch.
            item_tokens: Tokens of an item.
        """
        unit, amount = self.budget
        if unit == "epochs":
            return amount * math.ceil(items / self.batch)
        return amount if unit == "steps" else max(1, amount // (self.batch * item_tokens))


LOWEST = {"cosine": 0.1, "constant": 1.0}
"""Share of the learning rate that a schedule ends with. transformers' own constant one begins with a step at rate 0."""


def _nothing(_: Tensor) -> dict[str, float]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, on what, and towards what.

    Attributes:
        parameters: What is trained, by name, float32, on the job's device.
        items: (n,) int64: what an epoch visits; the caller knows what each number stands for.
        step: Given the (batch,) items of a step, yields parts of its loss, scalars. Each part's gradient is taken
            before the next is asked for, so that only one part is in memory.
        shuffled: Visit the items of each epoch in an order of its own; else as they are.
        item_tokens: Tokens of an item, for a budget in tokens.
        validate: Measures the weights, before the first step and after every epoch.
        gradients: Given a step's items, returns further numbers to log about the gradients, before they are clipped.
        pruned: By parameter name, bool of its shape: elements that stay zero.
        faster: By parameter name, a multiple of the learning rate; 1 where there is none.
    """

    parameters: Mapping[str, nn.Parameter]
    items: Tensor
    step: Callable[[Tensor], Iterable[Tensor]]
    shuffled: bool = True
    item_tokens: int = 1
    validate: Callable[[], Validation] | None = None
    gradients: Callable[[Tensor], Mapping[str, float]] = _nothing
    pruned: Mapping[str, Tensor] = field(default_factory=dict)
    faster: Mapping[str, float] = field(default_factory=dict)


@dataclass
class History:
    """What became of a training.

    Attributes:
        log: By name, a number of every step: `loss`, `learning_rate`, `gradient_norm`, and what the task adds.
        epoch_losses: Mean loss of each epoch; the last one may be a part of one.
        validation: Of the start, then after each epoch.
        best: Number of the best validation: 0 is the start, 1 the first epoch.
        stopped: Why it ended before its budget: `patience`, or the bad number that it met; empty if it didn't.
    """

    log: dict[str, list[float]] = field(default_factory=lambda: {"loss": []})
    epoch_losses: list[float] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    best: int = 0
    stopped: str = ""

    @property
    def losses(self) -> list[float]:
        """Loss of every step."""
        return self.log["loss"]

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)

    def summary(self) -> dict[str, Any]:
        """Return what a report says of a training in epochs."""
        return {
            "steps": self.steps,
            "epochs": len(self.epoch_losses),
            "best_epoch": self.best,
            "stopped": self.stopped or "budget",
            "losses": self.epoch_losses,
        }

    def rows(self) -> Iterator[dict[str, float]]:
        """Yield the numbers of every step."""
        for step, values in enumerate(zip(*self.log.values(), strict=True)):
            yield {"step": step, **dict(zip(self.log, values, strict=True))}


def write_log(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Leave a line of JSON per step in an artifact."""
    (directory / LOG).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(task: Task, settings: Settings, job: Job, *, name: str = "training") -> History:
    """Train parameters in place.

    Args:
        task: What.
        settings: How.
        job: Its seed orders the items, its device computes, its scratch folder holds checkpoints, its progress is told.
        name: Tells the trainings of one job apart.

    Raises:
        StageFailedError: A bad number before there were any trained weights to keep: before the first epoch was
            validated if the best are kept, at the first step if the last are. Later, training ends with the weights
            before that step, and the history says why.
    """
    run = _Run(task, settings, job, job.scratch / f"{name}.pt")
    run.begin()
    with _board(job.scratch / TENSORBOARD / name, run.history.steps) as scalar:
        try:
            run.finish(scalar)
        except FloatingPointError as error:
            run.stop_at(error)
    if settings.keep == "best":
        _copy(run.best, task.parameters)
    return run.history


class _Run:
    """One training: optimizer, schedule, and where it stands."""

    def __init__(self, task: Task, settings: Settings, job: Job, checkpoint: Path) -> None:
        self.task = task
        self.settings = settings
        self.job = job
        self.checkpoint = checkpoint
        self.steps = settings.steps(len(task.items), task.item_tokens)
        self.per_epoch = max(1, math.ceil(len(task.items) / settings.batch))
        self.optimizer = _optimizer(_groups(task, settings), settings, job.device)
        self.schedule = get_scheduler(
            "cosine_warmup_with_min_lr",
            self.optimizer,
            num_warmup_steps=_warmup(settings.warmup, self.steps),
            num_training_steps=self.steps,
            scheduler_specific_kwargs={"min_lr_rate": LOWEST[settings.schedule]},
        )
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self._order = (-1, task.items)

    def begin(self) -> None:
        """Continue from the checkpoint, or validate the start."""
        if not is_intact(self.checkpoint, self.job.note):
            self._validate()
            return
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        _copy(state["parameters"], self.task.parameters)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.best, self.history = state["best"], History(**state["history"])

    def save(self) -> None:
        """Write the checkpoint; a reader sees all of it or the one before."""
        state = {
            "parameters": {name: each.detach() for name, each in self.task.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "history": asdict(self.history),
        }
        partial = self.checkpoint.with_suffix(".part")
        with partial.open("wb") as file:
            torch.save(state, file)
        keep_checked(partial, self.checkpoint)

    def finish(self, scalar: Callable[[str, float, int], None]) -> None:
        """Do the steps that are left.

        Args:
            scalar: Told (name, value, step) of every number.

        Raises:
            FloatingPointError: Loss or gradient isn't a number; the weights are as they were.
        """
        every = max(1, self.steps // CHECKPOINTS)
        while self.history.steps < self.steps and not self.history.stopped:
            index = self.history.steps
            told = self.step(self._items(index))
            for name, value in told.items():
                self.history.log.setdefault(name, []).append(value)
                scalar(name, value, index)
            ended = (index + 1) % self.per_epoch == 0 or index + 1 == self.steps
            if ended:
                self._close_epoch(scalar)
            if ended or (index + 1) % every == 0:
                self.save()
            self.job.progress(index + 1, self.steps, "training step")

    def _items(self, index: int) -> Tensor:
        epoch, place = divmod(index, self.per_epoch)
        if self.task.shuffled and self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.job.seed * 1_000_003 + epoch)
            self._order = epoch, self.task.items[torch.randperm(len(self.task.items), generator=generator)]
        return self._order[1][place * self.settings.batch : (place + 1) * self.settings.batch]

    def step(self, items: Tensor) -> dict[str, float]:
        """Do one optimizer step and return its numbers.

        Raises:
            FloatingPointError: Loss or gradient isn't a number; the weights are as they were.
        """
        index = self.history.steps
        torch.manual_seed(self.job.seed * 1_000_003 + index)
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for part in self.task.step(items):
            if part.requires_grad:
                part.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            loss += float(part.detach())
        more = self.task.gradients(items)
        norm = float(nn.utils.clip_grad_norm_(self.task.parameters.values(), self.settings.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"loss {loss} with a gradient of norm {norm} at step {index}")
        learning_rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for name, mask in self.task.pruned.items():
                self.task.parameters[name].masked_fill_(mask, 0)
        return {"loss": loss, "learning_rate": learning_rate, "gradient_norm": norm, **more}

    def _validate(self) -> Validation:
        """Measure the weights, and note them if they are the best so far."""
        if self.task.validate is None:
            return {}
        found = dict(self.task.validate())
        seen = self.history.validation
        seen.append(found)
        if self.settings.keep == "best" and self._improved():
            self.history.best = len(seen) - 1
            self.best = {name: each.detach().cpu().clone() for name, each in self.task.parameters.items()}
        return found

    def _improved(self) -> bool:
        """Return whether the newest validation is the best; the start is not, if trained weights are as good."""
        *before, newest = (each["score"] for each in self.history.validation)
        best = self.history.best
        return not before or newest > before[best] or (best == 0 and newest == before[0])

    def _close_epoch(self, scalar: Callable[[str, float, int], None]) -> None:
        epochs = self.history.epoch_losses
        losses = self.history.losses[len(epochs) * self.per_epoch :]
        epochs.append(sum(losses) / len(losses))
        found = self._validate()
        if found:
            scalar("validation", found["score"], self.history.steps)
        patience = self.settings.patience
        if patience is not None and len(epochs) - self.history.best >= patience and self.history.steps < self.steps:
            self.history.stopped = "patience"

    def stop_at(self, error: FloatingPointError) -> None:
        """End at a bad number, if there are trained weights to keep.

        Raises:
            StageFailedError: There are none.
        """
        keeping = self.history.epoch_losses if self.settings.keep == "best" else self.history.losses
        if not keeping:
            message = f"training met {error}, before there were any good weights"
            fix = "lower learning_rate, or look for bad numbers in the model"
            raise StageFailedError(message, fix=fix) from error
        self.history.stopped = str(error)
        if self.settings.keep == "last":
            self._validate()


def _warmup(share_or_steps: float, steps: int) -> int:
    return math.ceil(share_or_steps * steps) if share_or_steps < 1 else int(share_or_steps)


def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _groups(task: Task, settings: Settings) -> list[dict[str, Any]]:
    """Return parameters by their learning rate, as optimizers take them."""
    found: dict[float, list[nn.Parameter]] = {}
    for name, each in task.parameters.items():
        found.setdefault(task.faster.get(name, 1.0), []).append(each)
    return [{"params": group, "lr": settings.learning_rate * multiple} for multiple, group in found.items()]


def _optimizer(groups: Sequence[dict[str, Any]], settings: Settings, device: str) -> torch.optim.Optimizer:
    """Return AdamW.

    Raises:
        StageFailedError: Its 8-bit kind doesn't run on the device.
    """
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    import bitsandbytes

    if device.partition(":")[0] not in bitsandbytes.supported_torch_devices:
        message = f"bitsandbytes has no 8-bit AdamW for the device {device!r}"
        raise StageFailedError(message, fix="set optimizer: adamw")
    eight: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    return eight


@contextmanager
def _board(folder: Path, done: int) -> Iterator[Callable[[str, float, int], None]]:
    """Yield who writes a number of a step to a log for TensorBoard, or nobody where that isn't installed.

    Args:
        folder: Where.
        done: Steps that a checkpoint holds: later ones, of a run that was killed, are written anew.
    """
    if find_spec("tensorboard") is None:
        yield lambda _name, _value, _step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    board: Any = SummaryWriter(folder, purge_step=done or None)
    try:
        yield board.add_scalar
    finally:
        board.close()
