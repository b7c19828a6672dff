"""Medusa-2: train low-rank updates and Medusa heads together, so that hidden states tell more of what comes.

Paper   Cai et al. 2024, arXiv:2401.10774, section 2.2.2 (joint training, heads first); section 2.3.2 (the model's own
        predictions as the aim)
Helps   heads that a later `speculate: {method: medusa}` trains on the final weights: they guess more, and may start
        from these
Hurts   the model itself: what it says changes, so read the quality measured after this step and set a gate on it; zeros
        of a pruning can't be trained around: refused after prune methods that write zeros
Cost    a forward pass per token while heads learn alone, four after that, each with the output layer once more per
        head; two bytes per weight of the model and 16 per weight of the adapters and the heads
Differs adapters beside the linears of the blocks, none beside the output layer; heads share that layer, which stays as
        it is; λ0 is constant; no dropout, so that a resumed run ends with the same bytes
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal

from pydantic import Field

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, calibrated, no_objection
from optikit.stages.finetune._training import (
    LOGIT_COPIES,
    MOST_TOKENS,
    TrainingOptions,
    after_training,
    check_training,
    estimate_training,
    settings_of,
)
from optikit.targets import Target

SUMMARY = "Medusa-2: train low-rank updates and Medusa heads together, before quantization"
NEEDS = DENSE
WRITES = "model"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "bitsandbytes")
ENVIRONMENT = MAIN
inputs = calibrated
fits = no_objection

PROMPT = 32
"""Tokens of a calibration window that the model continues."""
WEIGHTS = {"text": 0.2, "own": 0.01}
"""λ0 by aim: the paper's case study, and its authors' self-distilled runs; a divergence is smaller than a loss."""


class Options(TrainingOptions):
    """Options of `finetune: {method: medusa2}`."""

    learning_rate: float = Field(default=5e-4, gt=0, le=1)
    """Of the low-rank updates, after the warm-up, which takes a twentieth of the steps; falls to a tenth along a
    cosine. The paper's."""
    faster: float = Field(default=4.0, gt=0, le=1000)
    """Heads learn with this multiple of it, alone and together: four in the paper."""
    heads: int = Field(default=3, ge=1, le=8)
    """Heads, as many as `speculate` is to have; the paper has five."""
    layers: int = Field(default=1, ge=1, le=4)
    """Residual layers per head."""
    alone: float = Field(default=0.5, ge=0, le=0.95)
    """Share of the tokens on which only the heads learn, before both do: their gradients are large at first and would
    spoil the model. The paper's authors train as long alone as together."""
    aim: Literal["own", "text"] = "own"
    """What the model is held to: its own predictions before training, or the next token of the text, from which it
    learns the text besides."""
    heads_weight: float | None = Field(default=None, gt=0, le=100)
    """λ0, the weight of the heads' loss against the model's: more makes heads better and changes the model more. Empty
    is 0.2 for `aim: text` and 0.01 for `aim: own`."""
    text: Literal["calibration", "own"] = "calibration"
    """What is trained on: the calibration text, or what the model writes after its beginnings."""
    rank: int = Field(default=32, ge=1, le=1024)
    """Of every update; larger learns more and takes more memory. The paper's."""
    alpha: int = Field(default=16, gt=0, le=4096)
    """Updates are scaled by alpha / rank. The paper's."""

    def weight(self) -> float:
        """Return λ0."""
        return WEIGHTS[self.aim] if self.heads_weight is None else self.heads_weight


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be trained, or lacks its library."""
    if find_spec("peft") is None:
        fix = "pip install 'optikit[finetune]', or leave this stage out: heads are trained without it"
        yield Problem(code="library-missing", message="medusa2 needs peft, which is not installed", fix=fix)
    yield from check_training(facts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the trained model; the heads beside it are a start for others, no heads of its."""
    return after_training(facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate passes of both stages, and adapters and heads in float32 with gradients and moments."""
    adapters = options.rank * sum(rows + columns for rows, columns in facts.linears.values())
    blocks = options.heads * options.layers * facts.hidden**2
    output = facts.vocab * facts.hidden
    ahead = (blocks + options.heads * output) / (facts.linear_elements + output)
    own = (options.aim == "own") * (1 - options.alone) + (options.text == "own")
    passes = options.alone + 3 * (1 - options.alone) + own + 3 * ahead
    logits = options.heads * LOGIT_COPIES // 2 * 4 * MOST_TOKENS * facts.vocab
    trained = adapters + blocks
    held = 2 * facts.parameters + 4 * (trained + output) + logits
    return estimate_training(options, facts, calibration_tokens, trained=trained, held_bytes=held, passes=passes)


def run(options: Options, job: Job) -> Facts:
    """Train heads alone, then adapters and heads; merge the adapters."""
    from optikit.training.finetune import adapted
    from optikit.training.joint_medusa import Course, train_jointly

    course = Course(
        heads=options.heads,
        layers=options.layers,
        alone=options.alone,
        faster=options.faster,
        weight=options.weight(),
        own=options.aim == "own",
        prompt=PROMPT if options.text == "own" else 0,
    )
    return train_jointly(job, adapted(job, rank=options.rank, alpha=options.alpha), settings_of(options), course)
