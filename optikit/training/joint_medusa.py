"""Training a checkpoint and heads on its hidden states together: heads alone first, then both (Medusa-2).

The backbone is trained by low-rank adapters. With these switched off it is the model that it was, so that its own
predictions, which the trained ones are held to, need no second model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from optikit.algorithms.losses import cross_entropy, divergence, heads_loss, joint_loss, targets_of
from optikit.algorithms.medusa import Accuracy, MedusaHeads, accuracy
from optikit.algorithms.precision import compute_dtype
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import save_tensors
from optikit.formats.medusa import HEADS_START, tensors_of
from optikit.stage import Job
from optikit.training.finetune import HELD_OUT, Student, curve, draw, held_out, mean_loss, self_generated_windows, write
from optikit.training.loop import History, Settings, Task, train, write_log

AT_ONCE = 256
"""Positions whose heads are measured at once: each head has a row of logits per position."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What joint training is told beside how long and how fast.

    Attributes:
        heads: Heads to train.
        layers: Residual blocks per head.
        alone: Share of the steps in which only heads learn, from 0; both learn in the rest, in one step at least.
        faster: Multiple of the backbone's learning rate with which heads learn.
        weight: λ0.
        own: The backbone's aim is what it predicted before; else the next token of the text.
        prompt: Tokens of each window that the model continues itself; 0 takes the text itself.
    """

    heads: int
    layers: int
    alone: float
    faster: float
    weight: float
    own: bool
    prompt: int = 0


class _Pair:
    """A model with adapters, and heads on what its output layer reads.

    Attributes:
        heads: The heads, untrained: each an exact copy of the model's own.
    """

    def __init__(self, job: Job, model: Any, course: Course) -> None:
        self._device = job.device
        self._dtype = compute_dtype(job.device)
        self._model = model
        self._adapters = [each for each in model.modules() if isinstance(each, LoraLayer)]
        self._output = self._model.get_output_embeddings()
        self._course = course
        rows = self._output.weight.detach()
        self.heads = MedusaHeads(rows, heads=course.heads, layers=course.layers)
        self.heads.to(job.device)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Let the model be what it was: its adapters are off."""
        for each in self._adapters:
            each.enable_adapters(enabled=False)
        try:
            yield
        finally:
            for each in self._adapters:
                each.enable_adapters(enabled=True)

    def _exactly(self) -> Any:
        enabled = self._dtype is not torch.float32
        return torch.autocast(self._device.partition(":")[0], dtype=self._dtype, enabled=enabled)

    def read(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (1, tokens, vocabulary) of a window, and the states (tokens, width) that they were made of."""
        kept: list[Tensor] = []

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept.append(inputs[0])

        hook = self._output.register_forward_pre_hook(note)
        try:
            with self._exactly():
                logits: Tensor = self._model(input_ids=window, use_cache=False).logits
        finally:
            hook.remove()
        return logits, kept[0][0]

    def _original(self, window: Tensor) -> Tensor:
        with torch.no_grad(), self.unchanged():
            return self.read(window)[0]

    def _ahead(self, hidden: Tensor, window: Tensor) -> Tensor:
        with self._exactly():
            return heads_loss(self.heads, hidden, targets_of(window, self._course.heads, self._course.prompt))

    def alone(self, window: Tensor) -> Tensor:
        """Return the loss of the heads on the model as it was: only they get a gradient."""
        window = window.to(self._device)
        with torch.no_grad(), self.unchanged():
            _, hidden = self.read(window)
        return self._ahead(hidden, window)

    def both(self, window: Tensor) -> Tensor:
        """Return the joint loss."""
        window = window.to(self._device)
        original = self._original(window) if self._course.own else None
        logits, hidden = self.read(window)
        return joint_loss(logits, window, self._ahead(hidden, window), weight=self._course.weight, original=original)

    def next_token(self, window: Tensor) -> Tensor:
        """Return the model's own loss."""
        window = window.to(self._device)
        return cross_entropy(self.read(window)[0], window)

    def moved(self, window: Tensor) -> Tensor:
        """Return how far the model's predictions are from what they were."""
        window = window.to(self._device)
        return divergence(self.read(window)[0], self._original(window), 1.0)

    def guessed(self, text: Tensor) -> dict[str, Any]:
        """Return how well the heads guess on windows (n, tokens)."""
        states, targets = [], []
        with torch.no_grad():
            for window in torch.split(text.to(self._device), 1):
                states.append(self.read(window)[1].float())
                targets.append(targets_of(window, self._course.heads, self._course.prompt))
        found: Accuracy = accuracy(self.heads, torch.cat(states), torch.cat(targets), batch=AT_ONCE)
        shares = {"top1": found.top1, "top5": found.top5, "chain": found.chain}
        rounded = {name: [round(value, 4) for value in share] for name, share in shares.items()}
        return {**rounded, "tokens_per_step": round(found.tokens_per_step, 4), "positions": found.positions}


def train_jointly(job: Job, student: Student, settings: Settings, course: Course) -> dict[str, Any]:
    """Train adapters and heads, write the merged weights to `job.dest` and the heads beside them.

    Args:
        job: The job.
        student: A model with low-rank adapters: `finetune.adapted`.
        settings: How long, and how fast the backbone learns.
        course: What else.

    Returns:
        Facts: as of `finetune`, how far the predictions moved, and how well heads guess held-out text: untrained, after
        they learned alone, and after both did.

    Raises:
        StageFailedError: No calibration text, a bad number before the backbone was trained, or a result that isn't what
            was promised.
    """
    torch.set_num_threads(job.threads)
    pair = _Pair(job, student.model, course)
    steps, text = draw(job, settings)
    if course.prompt:
        with pair.unchanged():
            text = self_generated_windows(job, student.model, text, course.prompt)
    learning, held = text[:-HELD_OUT], text[-HELD_OUT:]
    alone = min(round(course.alone * steps), steps - 1)
    first = alone * settings.batch
    warmed = _alone(
        _part(job, 0, steps), pair, learning[:first], held, replace(settings, budget=("steps", alone)), course
    )
    rest = replace(settings, budget=("steps", steps - alone))
    history = _together(_part(job, alone, steps), pair, student, learning[first:], held, rest, course)
    written = write(job, student.weights())
    save_tensors(job.dest / HEADS_START, tensors_of(pair.heads))
    told = [("alone", row) for row in warmed.rows()] + [("together", row) for row in history.rows()]
    write_log(job.dest, ({**row, "step": step, "stage": name} for step, (name, row) in enumerate(told)))
    untrained, after = warmed.validation[0]["heads"], history.validation[-1]
    return {
        "steps": len(told),
        "steps_alone": warmed.steps,
        "tokens": len(told) * settings.batch * text.shape[1],
        **held_out(history),
        "held_out_divergence": round(after["moved"], 4),
        "heads": {"untrained": untrained, "alone": warmed.validation[-1]["heads"], "together": after["heads"]},
        "losses_alone": curve(warmed.losses),
        "losses": curve(history.losses),
        "stopped": history.stopped,
        **written,
        "compute_dtype": str(compute_dtype(job.device)).removeprefix("torch."),
    }


def _part(job: Job, begin: int, steps: int) -> Job:
    """Return a job whose training is a part of one of so many steps."""
    return replace(job, progress=lambda done, _total, what: job.progress(begin + done, steps, what))


def _alone(job: Job, pair: _Pair, text: Tensor, held: Tensor, settings: Settings, course: Course) -> History:
    """Train heads on the model as it was.

    Raises:
        StageFailedError: It met a bad number.
    """

    def validate() -> dict[str, Any]:
        found = pair.guessed(held)
        return {"score": found["tokens_per_step"], "heads": found}

    task = Task(
        parameters=_trained(pair.heads),
        items=torch.arange(len(text)),
        shuffled=False,
        step=lambda items: (pair.alone(text[item][None]) / len(items) for item in items),
        validate=validate,
    )
    settings = replace(settings, learning_rate=settings.learning_rate * course.faster)
    history = train(task, settings, job, name="training-alone")
    if history.stopped:
        message = f"heads met {history.stopped} while they learned alone: the model is as it was"
        raise StageFailedError(message, fix="lower faster or learning_rate")
    return history


def _together(
    job: Job, pair: _Pair, student: Student, text: Tensor, held: Tensor, settings: Settings, course: Course
) -> History:
    heads = {f"heads.{name}": each for name, each in _trained(pair.heads).items()}

    def validate() -> dict[str, Any]:
        guessed, loss, moved = pair.guessed(held), mean_loss(pair.next_token, held), mean_loss(pair.moved, held)
        return {"score": guessed["tokens_per_step"], "loss": loss, "moved": moved, "heads": guessed}

    task = Task(
        parameters={**student.parameters, **heads},
        items=torch.arange(len(text)),
        shuffled=False,
        step=lambda items: (pair.both(text[item][None]) / len(items) for item in items),
        validate=validate,
        pruned=student.pruned,
        faster=dict.fromkeys(heads, course.faster),
    )
    return train(task, settings, job)


def _trained(heads: MedusaHeads) -> dict[str, nn.Parameter]:
    return {name: each for name, each in heads.named_parameters() if each.requires_grad}
