"""Training a checkpoint and heads on its hidden states together: heads alone first, then both (Medusa-2).

The backbone is trained by low-rank adapters. With these switched off it is the model that it was, so that its own
predictions, which the trained ones are held to, need no second model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from optikit.training.finetune import (
    CHECKPOINT,
    HELD_OUT,
    Student,
    curve,
    draw,
    keep_log,
    live,
    mean_loss,
    own_words,
    write,
)
from optikit.training.loop import History, Observer, Settings, train

ALONE = f"alone-{CHECKPOINT}"
"""Checkpoint of the first stage, in scratch."""
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
        prompt: Tokens of each window that the model continues in its own words; 0 takes the text itself.
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
        student: A model with low-rank adapters: `finetuning.adapted`.
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
    alone = min(round(course.alone * settings.steps), settings.steps - 1)
    text = draw(job, settings.steps * settings.batch)
    if course.prompt:
        with pair.unchanged():
            text = own_words(job, student.model, text, course.prompt)
    held, first = text[-HELD_OUT:], alone * settings.batch
    before, guessed = mean_loss(pair.next_token, held), {"untrained": pair.guessed(held)}
    with live(job, settings.steps) as observe:
        warmed = _alone(job, pair, text[:first], replace(settings, steps=alone), course, observe)
        guessed["alone"] = pair.guessed(held)
        rest = replace(settings, steps=settings.steps - alone)
        history = _together(job, pair, student, text[first:-HELD_OUT], rest, course, _later(observe, alone))
    guessed["together"] = pair.guessed(held)
    after, moved = mean_loss(pair.next_token, held), mean_loss(pair.moved, held)
    written = write(job, student.weights())
    save_tensors(job.dest / HEADS_START, tensors_of(pair.heads))
    told = [*(("alone", loss) for loss in warmed.losses), *(("together", loss) for loss in history.losses)]
    keep_log(job, ({"step": step, "stage": name, "loss": loss} for step, (name, loss) in enumerate(told)))
    return {
        "steps": len(told),
        "steps_alone": len(warmed.losses),
        "tokens": len(told) * settings.batch * text.shape[1],
        "held_out_loss_before": round(before, 4),
        "held_out_loss_after": round(after, 4),
        "held_out_divergence": round(moved, 4),
        "heads": guessed,
        "losses_alone": curve(warmed.losses),
        "losses": curve(history.losses),
        "stopped": history.stopped,
        **written,
        "compute_dtype": str(compute_dtype(job.device)).removeprefix("torch."),
    }


def _alone(job: Job, pair: _Pair, text: Tensor, settings: Settings, course: Course, observe: Observer) -> History:
    """Train heads on the model as it was.

    Raises:
        StageFailedError: It met a bad number.
    """
    settings = replace(settings, learning_rate=settings.learning_rate * course.faster)
    history = train(_trained(pair.heads), text, pair.alone, settings, checkpoint=job.scratch / ALONE, observe=observe)
    if history.stopped:
        message = f"heads met {history.stopped} while they learned alone: the model is as it was"
        raise StageFailedError(message, fix="lower faster or learning_rate")
    return history


def _together(
    job: Job, pair: _Pair, student: Student, text: Tensor, settings: Settings, course: Course, observe: Observer
) -> History:
    heads = {f"heads.{name}": each for name, each in _trained(pair.heads).items()}
    return train(
        {**student.parameters, **heads},
        text,
        pair.both,
        settings,
        checkpoint=job.scratch / CHECKPOINT,
        pruned=student.pruned,
        faster=dict.fromkeys(heads, course.faster),
        observe=observe,
    )


def _trained(heads: MedusaHeads) -> dict[str, nn.Parameter]:
    return {name: each for name, each in heads.named_parameters() if each.requires_grad}


def _later(observe: Observer, steps: int) -> Observer:
    """Return an observer of a training that goes on after so many steps."""

    def tell(told: Mapping[str, float]) -> None:
        observe({**told, "step": told["step"] + steps})

    return tell
