"""LoRA: train a low-rank update beside every linear of the blocks, and merge it into the weights at the end.

Paper   Hu et al. 2021, arXiv:2106.09685
Helps   adapting on little memory: only the adapters have gradients and moments
Hurts   zeros of a pruning can't be trained around: refused after prune methods that write zeros
Cost    three forward passes per token; two bytes per weight of the model and 16 per weight of the adapters
Differs merged into the stored weights in float32, so that they are rounded once; no dropout
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from pydantic import Field

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, calibrated, no_objection
from optikit.stages.finetune._training import (
    TrainingOptions,
    after_training,
    check_training,
    estimate_training,
    settings_of,
)
from optikit.targets import Target

SUMMARY = "LoRA: train low-rank updates of all linears on text, merged at the end"
NEEDS = DENSE
WRITES = "model"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "bitsandbytes")
ENVIRONMENT = MAIN
inputs = calibrated
fits = no_objection


class Options(TrainingOptions):
    """Options of `finetune: {method: lora}`."""

    learning_rate: float = Field(default=5e-4, gt=0, le=1)
    """After the warm-up, which takes a twentieth of the steps; falls to a tenth along a cosine."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Of every update; larger learns more and takes more memory."""
    alpha: int = Field(default=32, gt=0, le=4096)
    """Updates are scaled by alpha / rank."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be trained, or lacks its library."""
    if find_spec("peft") is None:
        fix = "pip install 'optikit[finetune]', or use method full"
        yield Problem(code="library-missing", message="lora needs peft, which is not installed", fix=fix)
    yield from check_training(facts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the trained model."""
    return after_training(facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate forward and backward passes, and adapters in float32 with gradients and moments."""
    trained = options.rank * sum(rows + columns for rows, columns in facts.linears.values())
    held = 2 * facts.parameters + 4 * trained
    return estimate_training(options, facts, calibration_tokens, trained=trained, held_bytes=held, passes=3)


def run(options: Options, job: Job) -> Facts:
    """Train adapters on the calibration text and merge them."""
    from optikit.training.finetune import adapted, finetune

    return finetune(job, adapted(job, rank=options.rank, alpha=options.alpha), settings_of(options))
