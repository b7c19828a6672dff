"""Magnitude: the smallest weights of each layer become zero, whatever flows through them.

Paper   Han et al. 2015, arXiv:1506.02626, without its retraining
Helps   first looks; the trivial baseline that every other pruning here is judged against
Hurts   at half the weights a language model is badly damaged; use wanda or sparsegpt
Cost    seconds; the memory of one linear, however large the model; the weights are read three times
Differs nothing
"""

from __future__ import annotations

from collections.abc import Iterator

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, directory_bytes, no_objection, no_row, nothing
from optikit.stages import _blockwise_cost
from optikit.stages.prune._pattern import PatternOptions, after_pattern, check_pattern, ignore, pattern_of
from optikit.targets import Target

SUMMARY = "magnitude: the smallest weights become zero, without calibration"
NEEDS = DENSE
WRITES, CHANGES = "model", "linears"
USES_TARGET = False
LIBRARIES = ("torch", "safetensors")
ENVIRONMENT = MAIN
inputs = nothing
fits = no_objection
needs_row = no_row


class Options(PatternOptions):
    """Options of `prune: {method: magnitude}`."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield where the pattern doesn't fit."""
    yield from check_pattern(options, facts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the pruned model."""
    return after_pattern(options, facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate one sort of every layer and one copy of the weights."""
    return Estimate(
        seconds=3 + facts.linear_elements * 1e-7,
        peak_bytes=_blockwise_cost.data_free_peak(facts, element_bytes=4 if facts.dtype == "F32" else 2),
        disk_bytes=directory_bytes(facts.weight_bytes, facts.vocab),
        scratch_bytes=facts.weight_bytes,
    )


def run(options: Options, job: Job) -> Facts:
    """Zero the smallest weights of every linear of every block."""
    from optikit.calibration import blockwise
    from optikit.calibration.methods.pruning import DataFreePruning
    from optikit.calibration.write_checkpoint import SparseLayout

    method = DataFreePruning(SparseLayout(pattern_of(options)))
    return blockwise.run(job, method, identity=f"magnitude {options!r}", ignore=ignore(options)).facts
