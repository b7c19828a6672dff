"""SparseGPT: remove weights one column at a time, moving each error onto columns not yet visited.

Paper   Frantar and Alistarh 2023, arXiv:2301.00774
Helps   the best quality of the methods here that write zeros, most of all at 2:4
Hurts   nothing gets faster: no server here has a kernel for scattered zeros; quality at half the weights
Cost    forward passes and Hessians as for gptq; O(in²) float32 memory per linear, O(in³ + out·in²) time
Differs layers whose Hessian can't be inverted fall back to magnitude, and are counted
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from pydantic import Field

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, no_objection, no_row, split_calibrated
from optikit.stages import _blockwise_cost
from optikit.stages._experts import ExpertOptions
from optikit.stages.prune._pattern import PatternOptions, after_pattern, check_pattern, ignore, pattern_of
from optikit.targets import Target

SUMMARY = "SparseGPT: weights become zero one column at a time, the others make up for them"
NEEDS = DENSE
WRITES, CHANGES = "model", "linears"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT = MAIN
inputs = split_calibrated
fits = no_objection
needs_row = no_row


class Options(PatternOptions, ExpertOptions):
    """Options of `prune: {method: sparsegpt}`."""

    damp: float = Field(default=0.01, gt=0, le=1)
    """Added to the Hessian's diagonal before it is inverted, as a fraction of the diagonal's mean."""
    correct: bool = True
    """Aim at the dense model's outputs, making up for what the layers before have lost. Doubles the forward passes."""
    correct_damp: float = Field(default=0.05, gt=0, le=10)
    """What holds a weight back from being corrected: added to the Hessian's diagonal, as a fraction of its mean; more
    than that where there are fewer than ten calibration tokens for each input channel."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield where the pattern doesn't fit."""
    yield from check_pattern(options, facts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the pruned model."""
    return after_pattern(options, facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate a walk with Hessians, beside the dense model where it corrects."""
    times = 2 if options.correct else 1
    return _blockwise_cost.estimate(
        facts,
        calibration_tokens,
        passes=times,
        grams=times,
        seconds_per_weight=7e-7,
        written_bytes=facts.weight_bytes,
        held=_blockwise_cost.PAIRED if options.correct else _blockwise_cost.GRAM,
    )


def run(options: Options, job: Job) -> Facts:
    """Walk the blocks, pruning each on the outputs of the pruned ones before it."""
    from optikit.algorithms import sparsegpt
    from optikit.calibration import blockwise
    from optikit.calibration.methods.pruning import GramPruning
    from optikit.calibration.write_checkpoint import SparseLayout

    method = GramPruning(
        SparseLayout(pattern_of(options)),
        kernel=partial(sparsegpt.prune_group, damp=options.damp),
        correct_damp=options.correct_damp if options.correct else None,
    )
    facts, rows = blockwise.run(
        job, method, identity=f"sparsegpt {options!r}", ignore=ignore(options), experts=options.experts
    )
    return {**facts, "by_magnitude": sorted(name for name, row in rows.items() if row["by_magnitude"])}
