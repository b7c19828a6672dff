"""Distill: train every weight of the blocks towards the predictions of the recipe's own model, before any stage.

Paper   Hinton et al. 2015, arXiv:1503.02531; after pruning: Muralidharan et al. 2024, arXiv:2407.14679 (Minitron)
Helps   after pruning: a distribution teaches more per token than the next token alone, and nothing new is learned
Hurts   a model that was adapted after its checkpoint: the teacher pulls it back to where it was
Cost    four forward passes per token, and writing for `text: own`; 16 bytes per trained weight (10 with adamw8bit) and
        the teacher, the whole of both at once
Differs only the last layer's predictions are compared, no hidden states; zeros that a pruning left stay zeros
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, ORIGINAL, Estimate, Facts, Input, Job, calibrated, no_objection
from optikit.stages.finetune._training import (
    WholeOptions,
    after_training,
    check_training,
    estimate_training,
    settings_of,
)
from optikit.targets import Target

SUMMARY = "distill: train all weights towards the unpruned model's predictions"
NEEDS = DENSE
WRITES = "model"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "bitsandbytes")
ENVIRONMENT = MAIN
fits = no_objection

PROMPT = 32
"""Tokens of a calibration window that the teacher continues."""


class Options(WholeOptions):
    """Options of `finetune: {method: distill}`."""

    teacher: Literal["model"] = "model"
    """Whose predictions are the aim: those of the recipe's `model`, as it was before any stage."""
    text: Literal["calibration", "own"] = "calibration"
    """What the predictions are compared on: the calibration text, or what the teacher writes after its beginnings."""
    temperature: float = Field(default=1.0, ge=0.1, le=20)
    """Softens both predictions: above 1, unlikely tokens count more."""


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare the text, and the model as it was before any stage."""
    return {**calibrated(options), "teacher": ORIGINAL}


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be trained."""
    yield from check_training(facts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the trained model."""
    return after_training(facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate the passes, weights in float32 with gradients and moments, and a teacher a third larger."""
    trained = facts.parameters if options.embeddings else facts.linear_elements
    passes = 5.0 if options.text == "own" else 4.3
    return estimate_training(
        options, facts, calibration_tokens, trained=trained, held_bytes=7 * facts.parameters, passes=passes
    )


def run(options: Options, job: Job) -> Facts:
    """Train towards the teacher's predictions."""
    from optikit.training.finetune import Teaching, finetune, whole

    teaching = Teaching(temperature=options.temperature, prompt=PROMPT if options.text == "own" else 0)
    return finetune(job, whole(job, embeddings=options.embeddings), settings_of(options), teaching)
