"""Train weights for a bounded number of steps: resumable to the byte, and it stops at the first bad number.

What is trained, on what, and towards what is the caller's: a loss per batch, and a list of parameters. Zeros that a
pruning left stay zeros, because masks are applied after every step. A batch is a few windows, each with its own
backward pass, so that the logits of one window are all that is ever in memory.

Papers: AdamW, Loshchilov and Hutter, arXiv:1711.05101; 8-bit moments, Dettmers et al., arXiv:2110.02861;
distillation, Hinton et al., arXiv:1503.02531.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optikit.errors import StageFailedError

CHECKPOINTS = 20
"""Checkpoints of one training: a killed run loses at most a twentieth."""
CLIP = 1.0
"""Largest norm of a step's gradient; larger ones are scaled down to it."""

Observer = Callable[[Mapping[str, float]], None]
"""Told about every step: `step`, `loss`, `learning_rate`, `gradient_norm`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        batch: Windows per step.
        learning_rate: After the warm-up; falls to a tenth along a cosine.
        warmup: Share of the steps with a linearly rising rate.
        weight_decay: AdamW's.
        optimizer: `adamw8bit` keeps its moments in 8 bits.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"


@dataclass
class History:
    """What became of a training.

    Attributes:
        losses: Mean loss of every step.
        stopped: Why it ended early; empty if it didn't.
    """

    losses: list[float] = field(default_factory=list)
    stopped: str = ""


def rate(step: int, settings: Settings) -> float:
    """Return the learning rate of a step, from 0.

    >>> [round(rate(s, Settings(steps=100, batch=1, learning_rate=1.0, warmup=0.1)), 2) for s in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    rising = math.ceil(settings.warmup * settings.steps)
    if step < rising:
        return settings.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, settings.steps - rising)
    return settings.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


class _Run:
    """One training: parameters, optimizer, and where it stands."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        pruned: Mapping[str, Tensor],
        faster: Mapping[str, float],
        settings: Settings,
        checkpoint: Path,
    ) -> None:
        self.parameters = parameters
        self.pruned = pruned
        self.settings = settings
        self.checkpoint = checkpoint
        self.optimizer = _adamw(_groups(parameters, faster), settings)
        self.history = History()

    def restore(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        with torch.no_grad():
            for name, value in state["parameters"].items():
                self.parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])

    def save(self) -> None:
        """Write the checkpoint; a reader sees all of it or the one before."""
        partial = self.checkpoint.with_suffix(".part")
        state = {
            "parameters": {name: each.detach() for name, each in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
        }
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def step(self, windows: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Do one optimizer step, unless its numbers are bad.

        Raises:
            FloatingPointError: Loss or gradient isn't a number; the weights are as they were.
        """
        done = len(self.history.losses)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for window in torch.split(windows, 1):
            part = loss(window) / len(windows)
            part.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            total += float(part.detach())
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), CLIP))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise FloatingPointError(f"loss {total} with a gradient of norm {norm} at step {done}")
        learning_rate = rate(done, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["multiple"]
        self.optimizer.step()
        with torch.no_grad():
            for name, mask in self.pruned.items():
                self.parameters[name].masked_fill_(mask, 0)
        self.history.losses.append(total)
        return {"step": float(done), "loss": total, "learning_rate": learning_rate, "gradient_norm": norm}


def _groups(parameters: Mapping[str, nn.Parameter], faster: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return parameters by their multiple of the learning rate, as optimizers take them."""
    found: dict[float, list[nn.Parameter]] = {}
    for name, each in parameters.items():
        found.setdefault(faster.get(name, 1.0), []).append(each)
    return [{"params": group, "multiple": multiple} for multiple, group in found.items()]


def _adamw(parameters: Sequence[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        return optimizer
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def train(
    parameters: Mapping[str, nn.Parameter],
    windows: Tensor,
    loss: Callable[[Tensor], Tensor],
    settings: Settings,
    *,
    checkpoint: Path,
    pruned: Mapping[str, Tensor] | None = None,
    faster: Mapping[str, float] | None = None,
    observe: Observer = lambda _: None,
) -> History:
    """Train parameters in place.

    Args:
        parameters: What to train, by name, float32.
        windows: (steps · batch, tokens) int64, in the order in which they are seen.
        loss: Loss of one window, (1, tokens).
        settings: How.
        checkpoint: File that a killed run's successor continues from.
        pruned: By parameter name, bool of its shape: elements that stay zero.
        faster: By parameter name, a multiple of the learning rate; 1 where there is none.
        observe: Told about every step.

    Raises:
        StageFailedError: A bad number at the very first step: the model or the text is broken. Later, training ends
            with the weights before that step, and the history says why.
    """
    run = _Run(parameters, pruned or {}, faster or {}, settings, checkpoint)
    run.restore()
    every = max(1, settings.steps // CHECKPOINTS)
    for index in range(len(run.history.losses), settings.steps):
        try:
            told = run.step(windows[index * settings.batch : (index + 1) * settings.batch], loss)
        except FloatingPointError as error:
            if index == 0:
                fix = "does the dense model give finite outputs on this text?"
                raise StageFailedError(f"training met {error}", fix=fix) from error
            run.history.stopped = str(error)
            break
        if (index + 1) % every == 0:
            run.save()
        observe(told)
    return run.history
