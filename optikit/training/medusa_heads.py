"""Train Medusa heads on hidden states that were computed once: resumable, and it stops at the first bad number.

The model isn't needed any more: its hidden states and the tokens that it wrote are all that heads learn from. Each
epoch visits all rows in an order that depends on the seed and its number only, so a killed run continues exactly where
its last checkpoint was, and ends with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from optikit.algorithms.medusa import DECAY, IGNORED, Accuracy, MedusaHeads, accuracy, gradient_norms, losses
from optikit.errors import StageFailedError

Observer = Callable[[Mapping[str, float]], None]
"""Told about every step: `step`, `loss`, `learning_rate`, `gradient_norm_<k>`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        epochs: Most passes over the rows.
        batch: Rows per step.
        learning_rate: After the warm-up; falls to a tenth along a cosine.
        warmup: Steps of linear warm-up.
        decay: λ_k = decay^k.
        weight_decay: AdamW's.
        patience: Epochs without a better validation after which it ends.
        optimizer: `adamw8bit` keeps its moments in 8 bits (Dettmers et al., arXiv:2110.02861).
        checkpoint_every: Steps between checkpoints.
        seed: Orders the rows.
    """

    epochs: int = 10
    batch: int = 256
    learning_rate: float = 1e-3
    warmup: int = 40
    decay: float = DECAY
    weight_decay: float = 0.0
    patience: int = 2
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    checkpoint_every: int = 200
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What heads learn from.

    Attributes:
        hidden: (n, hidden) of any float dtype.
        targets: (n, heads) int64 of `make_targets`.
        before: (n, heads) int64 of `make_before`; sequential heads need it.
    """

    hidden: Tensor
    targets: Tensor
    before: Tensor | None = None

    def useful(self) -> Tensor:
        """Return the indices of rows that at least one head can learn from."""
        return torch.nonzero((self.targets != IGNORED).any(dim=1)).flatten()


@dataclass
class History:
    """What became of a training.

    Attributes:
        steps: Optimizer steps done.
        epochs: Epochs done.
        losses: Mean loss of each epoch, Σ_k λ_k CE_k.
        validation: Accuracy after each epoch.
        best: Number of the epoch whose heads were kept, from 0; -1 is the untrained start.
        stopped: Why it ended: `epochs`, `patience`, or the bad number that it met.
    """

    steps: int = 0
    epochs: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[Accuracy] = field(default_factory=list)
    best: int = -1
    stopped: str = ""


def _adamw(heads: MedusaHeads, settings: Settings) -> torch.optim.Optimizer:
    trained = [each for each in heads.parameters() if each.requires_grad]
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        return optimizer
    return torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def rate(step: int, total: int, settings: Settings) -> float:
    """Return the learning rate of a step, from 0.

    >>> [round(rate(s, 100, Settings(warmup=10, learning_rate=1.0)), 2) for s in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, total - settings.warmup)
    return settings.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


class _Run:
    """One training: heads, optimizer, and where it stands."""

    def __init__(self, heads: MedusaHeads, rows: Rows, validation: Rows, settings: Settings, folder: Path) -> None:
        self.heads = heads
        self.rows = rows
        self.validation = validation
        self.settings = settings
        self.checkpoint = folder / "training.pt"
        self.optimizer = _adamw(heads, settings)
        self.history = History()
        self.useful = rows.useful()
        self.per_epoch = math.ceil(len(self.useful) / settings.batch)
        self.start = self._weights()
        self.best = self.start
        self.best_value = -1.0
        self.epoch_loss = 0.0

    def _weights(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.heads.named_parameters() if each.requires_grad}

    def restore(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.heads.load_state_dict(state["heads"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        told = state["history"]
        seen = [Accuracy(**each) for each in told["validation"]]
        self.history = History(**{**told, "validation": seen})
        self.best, self.best_value, self.epoch_loss = state["best"], state["best_value"], state["epoch_loss"]

    def save(self) -> None:
        """Write the checkpoint; a reader sees all of it or the one before."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".part")
        state = {
            "heads": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
            "best": self.best,
            "best_value": self.best_value,
            "epoch_loss": self.epoch_loss,
        }
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def batches(self) -> Iterator[Tensor]:
        """Yield the rows of each step that this epoch still has to do."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.history.epochs)
        order = self.useful[torch.randperm(len(self.useful), generator=generator)]
        done = self.history.steps - self.history.epochs * self.per_epoch
        yield from torch.split(order, self.settings.batch)[done:]

    def step(self, batch: Tensor) -> dict[str, float]:
        """Do one optimizer step, unless its numbers are bad.

        Raises:
            FloatingPointError: Loss or gradient isn't a number; the weights are as they were.
            StageFailedError: A head that has something to learn gets no gradient.
        """
        step = self.history.steps
        learning_rate = rate(step, self.settings.epochs * self.per_epoch, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        hidden, targets = self.rows.hidden[batch].float(), self.rows.targets[batch]
        total = 0.0
        before = None if self.rows.before is None else self.rows.before[batch]
        for part in losses(self.heads, hidden, targets, before, decay=self.settings.decay):
            if part.requires_grad:
                part.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            total += float(part.detach())
        norms = gradient_norms(self.heads)
        if not all(map(math.isfinite, (total, *norms))):
            raise FloatingPointError(f"loss {total} at step {step}")
        learning = (self.heads.to_output_rows(targets) != IGNORED).any(dim=0).tolist()
        idle = [head for head, (norm, has) in enumerate(zip(norms, learning, strict=True)) if has and norm == 0]
        if idle:
            message = f"head {idle[0]} gets no gradient at step {step}"
            raise StageFailedError(message, fix="report this: the heads are not connected to their loss")
        self.optimizer.step()
        self.history.steps += 1
        self.epoch_loss += total
        named = {f"gradient_norm_{head}": norm for head, norm in enumerate(norms)}
        return {"step": float(step), "loss": total, "learning_rate": learning_rate, **named}

    def close_epoch(self) -> None:
        """Validate, and keep the heads if they are the best so far."""
        found = accuracy(self.heads, self.validation.hidden, self.validation.targets, self.validation.before)
        self.history.losses.append(self.epoch_loss / self.per_epoch)
        self.history.validation.append(found)
        if found.tokens_per_step > self.best_value:
            self.best, self.best_value, self.history.best = self._weights(), found.tokens_per_step, self.history.epochs
        self.history.epochs += 1
        self.epoch_loss = 0.0

    @property
    def stalled(self) -> bool:
        """Whether validation hasn't improved for too long."""
        return self.history.epochs - 1 - self.history.best >= self.settings.patience


def train(
    heads: MedusaHeads,
    rows: Rows,
    validation: Rows,
    settings: Settings,
    *,
    folder: Path,
    observe: Observer = lambda _: None,
) -> History:
    """Train heads in place, and leave in them the weights that validated best.

    Args:
        heads: The heads; what they hold is the start.
        rows: To learn from.
        validation: Of other documents.
        settings: How.
        folder: Where checkpoints wait for a killed run's successor.
        observe: Told about every step.

    Raises:
        StageFailedError: Nothing to learn from, a head without gradient, or a bad number before the first epoch was
            over: there are no good heads to keep then. Later, training ends with the best heads so far.
    """
    if not len(rows.useful()) or not len(validation.useful()):
        what = "learn from" if not len(rows.useful()) else "validate on"
        raise StageFailedError(f"heads have nothing to {what}", fix="give more prompts, with longer answers")
    run = _Run(heads, rows, validation, settings, folder)
    run.restore()
    try:
        _epochs(run, observe)
    except FloatingPointError as error:
        if run.history.best < 0:
            message = f"training met {error}, before there were any good heads"
            raise StageFailedError(message, fix="lower learning_rate, or look for bad numbers in the model") from error
        run.history.stopped = str(error)
    heads.load_state_dict(run.best, strict=False)
    return run.history


def _epochs(run: _Run, observe: Observer) -> None:
    while not run.history.stopped:
        for batch in run.batches():
            observe(run.step(batch))
            if run.history.steps % run.settings.checkpoint_every == 0:
                run.save()
        run.close_epoch()
        if run.history.epochs == run.settings.epochs:
            run.history.stopped = "epochs"
        elif run.stalled:
            run.history.stopped = "patience"
        run.save()
