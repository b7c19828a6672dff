"""Wanda: the weights whose product with the usual size of their input is smallest become zero; the rest stay.

Paper   Sun et al. 2023, arXiv:2306.11695
Helps   pruning a large model in minutes; nothing is updated, so nothing can go numerically wrong
Hurts   nothing gets faster: no server here has a kernel for scattered zeros; quality at half the weights
Cost    one and a half forward passes per block; memory of one block
Differs nothing
"""

from __future__ import annotations

from collections.abc import Iterator

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, no_objection, no_row, split_calibrated
from optikit.stages import _blockwise_cost
from optikit.stages._experts import ExpertOptions
from optikit.stages.prune._pattern import PatternOptions, after_pattern, check_pattern, ignore, pattern_of
from optikit.targets import Target

SUMMARY = "Wanda: weights with the smallest product with their input become zero"
NEEDS = DENSE
WRITES, CHANGES = "model", "linears"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT = MAIN
inputs = split_calibrated
fits = no_objection
needs_row = no_row


class Options(PatternOptions, ExpertOptions):
    """Options of `prune: {method: wanda}`."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield where the pattern doesn't fit."""
    yield from check_pattern(options, facts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the pruned model."""
    return after_pattern(options, facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate a walk that sums squares, and a sort of every row."""
    return _blockwise_cost.estimate(
        facts,
        calibration_tokens,
        passes=1,
        grams=0,
        seconds_per_weight=2e-7,
        written_bytes=facts.weight_bytes,
        held=_blockwise_cost.NORMS,
    )


def run(options: Options, job: Job) -> Facts:
    """Walk the blocks, pruning each on the outputs of the pruned ones before it."""
    from optikit.algorithms import wanda
    from optikit.calibration import blockwise
    from optikit.calibration.methods.pruning import NormPruning
    from optikit.calibration.write_checkpoint import SparseLayout

    method = NormPruning(SparseLayout(pattern_of(options)), kernel=wanda.mask)
    return blockwise.run(
        job, method, identity=f"wanda {options!r}", ignore=ignore(options), experts=options.experts
    ).facts
