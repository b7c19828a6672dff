"""What every training asks and promises: how much, how fast, on the recipe's calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from optikit.models import architectures
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import Estimate, StageOptions, directory_bytes
from optikit.stages._budget import Budget, budget
from optikit.stages._experts import refuse_experts, refuse_wrapped

if TYPE_CHECKING:
    from optikit.training.loop import Settings

LOGIT_COPIES = 6
"""Float32 copies of one window's logits that a loss and its gradient hold."""
MOST_TOKENS = 512
"""Tokens of a window that the estimate of memory counts with."""


class TrainingOptions(StageOptions):
    """How long and how fast to train."""

    tokens: int | None = Field(default=None, ge=1, le=10**10)
    """Tokens of calibration text to train on, in windows of `calibration.length`: what bounds the time. Empty, where
    `steps` and `epochs` are, too, is 100,000. Only `epochs` uses `samples`."""
    steps: int | None = Field(default=None, ge=1, le=10**8)
    """Steps to train for, in place of `tokens`."""
    epochs: int | None = Field(default=None, ge=1, le=10_000)
    """Passes over the `samples` windows of the calibration text, in place of `tokens`."""
    batch: int = Field(default=4, ge=1, le=4096)
    """Windows per step."""
    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    """After the warm-up, which takes a twentieth of the steps; falls to a tenth along a cosine."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """AdamW's pull towards zero, per step and learning rate."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps its moments in 8 bits (bitsandbytes): two bytes per trained weight instead of eight."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        self.budget()
        return self

    def budget(self) -> Budget:
        """Return how much to train: one of tokens, steps and epochs."""
        return budget(("tokens", 100_000), tokens=self.tokens, steps=self.steps, epochs=self.epochs)

    def trained_tokens(self, calibration_tokens: int) -> int:
        """Return about how many tokens that is, where an epoch has so many."""
        unit, amount = self.budget()
        return amount * {"tokens": 1, "steps": self.batch * MOST_TOKENS, "epochs": calibration_tokens}[unit]


class WholeOptions(TrainingOptions):
    """Which of a model's own weights are trained."""

    embeddings: bool = False
    """Train token embedding and output head too; pruning leaves them as they were, and they are large."""


def settings_of(options: TrainingOptions) -> Settings:
    """Return the options as the loop takes them."""
    from optikit.training.loop import Settings

    return Settings(
        budget=options.budget(),
        batch=options.batch,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        optimizer=options.optimizer,
    )


def check_training(facts: ModelFacts) -> Iterator[Problem]:
    """Yield what can't be trained."""
    if facts.architecture is None:
        message = f"model_type {facts.model_type!r} is not one whose linear layers are known"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {', '.join(architectures.names())}")
    yield from refuse_experts(facts, "nothing here trains experts")
    yield from refuse_wrapped(facts, "nothing here trains")


def after_training(facts: ModelFacts) -> ModelFacts:
    """Return the facts of the trained model: same shapes, same bytes, same zeros, other weights."""
    return facts.having("finetuned")


def estimate_training(
    options: TrainingOptions, facts: ModelFacts, tokens: int, *, trained: int, held_bytes: int, passes: float
) -> Estimate:
    """Estimate time and memory.

    Args:
        options: How long.
        facts: The model.
        tokens: Those of the calibration text.
        trained: Weights that have gradients and moments.
        held_bytes: Everything else that is held: weights, teacher.
        passes: Forward passes that one token costs; a backward pass counts twice.
    """
    moments = 2 if options.optimizer == "adamw8bit" else 8
    logits = LOGIT_COPIES * 4 * MOST_TOKENS * facts.vocab
    activations = 40 * 4 * MOST_TOKENS * facts.hidden * facts.layers
    work = 2.0 * passes * (facts.linear_elements + facts.vocab * facts.hidden) * options.trained_tokens(tokens)
    return Estimate(
        seconds=20 + work / 1.45e11,
        peak_bytes=700_000_000 + held_bytes + trained * (4 + moments) + logits + activations,
        disk_bytes=directory_bytes(facts.weight_bytes, facts.vocab),
        scratch_bytes=facts.weight_bytes + trained * (4 + moments),
    )
