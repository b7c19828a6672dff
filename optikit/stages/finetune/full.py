"""Full: train every weight of the blocks on the calibration text, to recover what pruning lost.

Paper   Loshchilov and Hutter 2017, arXiv:1711.05101 (AdamW)
Helps   after pruning, and to adapt a model to the kind of text it will see
Hurts   what the text doesn't show is forgotten: use text like the one that the model will serve, or distill
Cost    three forward passes per token; 16 bytes per trained weight (10 with adamw8bit), the whole model at once
Differs zeros that a pruning left stay zeros; no dropout, so that a resumed run ends with the same bytes
"""

from __future__ import annotations

from collections.abc import Iterator

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, calibrated, no_objection
from optikit.stages.finetune._training import (
    WholeOptions,
    after_training,
    check_training,
    estimate_training,
    settings_of,
)
from optikit.targets import Target

SUMMARY = "full: train all weights on text, zeros stay zeros"
NEEDS = DENSE
WRITES = "model"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "bitsandbytes")
ENVIRONMENT = MAIN
inputs = calibrated
fits = no_objection


class Options(WholeOptions):
    """Options of `finetune: {method: full}`."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be trained."""
    yield from check_training(facts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the trained model."""
    return after_training(facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate forward and backward passes, and weights in float32 with gradients and moments."""
    trained = facts.parameters if options.embeddings else facts.linear_elements
    return estimate_training(
        options, facts, calibration_tokens, trained=trained, held_bytes=4 * facts.parameters, passes=3
    )


def run(options: Options, job: Job) -> Facts:
    """Train on the calibration text."""
    from optikit.training.finetune import finetune, whole

    return finetune(job, whole(job, embeddings=options.embeddings), settings_of(options))
