"""What every training asks and promises: how much, how fast, on the recipe's calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from optikit.models import architectures
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import Estimate, Job, StageOptions, directory_bytes

if TYPE_CHECKING:
    from optikit.training.loop import Settings

LOGIT_COPIES = 6
"""Float32 copies of one window's logits that a loss and its gradient hold."""
MOST_TOKENS = 512
"""Tokens of a window that the estimate of memory counts with."""


class TrainingOptions(StageOptions):
    """How long and how fast to train."""

    tokens: int = Field(default=100_000, ge=1, le=10**10)
    """Tokens of calibration text to train on, in windows of `calibration.length`: what bounds the time. `samples` is
    not used."""
    batch: int = Field(default=4, ge=1, le=4096)
    """Windows per step."""
    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    """After the warm-up, which takes a twentieth of the steps; falls to a tenth along a cosine."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """AdamW's pull towards zero, per step and learning rate."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps its moments in 8 bits (bitsandbytes): two bytes per trained weight instead of eight."""


class WholeOptions(TrainingOptions):
    """Which of a model's own weights are trained."""

    embeddings: bool = False
    """Train token embedding and output head too; pruning leaves them as they were, and they are large."""


def settings_of(options: TrainingOptions, job: Job) -> Settings:
    """Return the options as the algorithm takes them: at least one step.

    Raises:
        StageFailedError: There is no calibration text to train on.
    """
    from optikit.training.loop import Settings

    return Settings(
        steps=max(1, options.tokens // (options.batch * job.calibrated().length)),
        batch=options.batch,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        optimizer=options.optimizer,
    )


def check_training(facts: ModelFacts) -> Iterator[Problem]:
    """Yield what can't be trained."""
    if architectures.find(facts.model_type) is None:
        message = f"model_type {facts.model_type!r} is not one whose linear layers are known"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {', '.join(architectures.names())}")


def after_training(facts: ModelFacts) -> ModelFacts:
    """Return the facts of the trained model: same shapes, same bytes, same zeros, other weights."""
    return facts.having("finetuned")


def estimate_training(
    options: TrainingOptions, facts: ModelFacts, *, trained: int, held_bytes: int, passes: float
) -> Estimate:
    """Estimate time and memory.

    Args:
        options: How long.
        facts: The model.
        trained: Weights that have gradients and moments.
        held_bytes: Everything else that is held: weights, teacher.
        passes: Forward passes that one token costs; a backward pass counts twice.
    """
    moments = 2 if options.optimizer == "adamw8bit" else 8
    logits = LOGIT_COPIES * 4 * MOST_TOKENS * facts.vocab
    activations = 40 * 4 * MOST_TOKENS * facts.hidden * facts.layers
    work = 2.0 * passes * (facts.linear_elements + facts.vocab * facts.hidden) * options.tokens
    return Estimate(
        seconds=20 + work / 2e11,
        peak_bytes=700_000_000 + held_bytes + trained * (4 + moments) + logits + activations,
        disk_bytes=directory_bytes(facts.weight_bytes, facts.vocab),
        scratch_bytes=facts.weight_bytes + trained * (4 + moments),
    )
