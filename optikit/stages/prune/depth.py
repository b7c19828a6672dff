"""Depth: leave out the decoder blocks that change least what passes through them.

Paper   Men et al. 2024, arXiv:2403.03853 (ShortGPT)
Helps   latency and memory on every target, in proportion: the result is a smaller model that any loader accepts
Hurts   quality at once and a lot on small models; plan to train afterwards
Cost    one forward pass over the calibration text, O(1) memory beside it
Differs blocks at either end can be kept by rule
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pydantic import Field

from optikit.models import architectures
from optikit.models.facts import DTYPE_BYTES, ModelFacts
from optikit.problems import Problem
from optikit.stage import (
    DENSE,
    MAIN,
    Estimate,
    Facts,
    Job,
    StageOptions,
    directory_bytes,
    no_objection,
    split_calibrated,
)
from optikit.stages._experts import refuse_experts, refuse_wrapped
from optikit.targets import Target

SUMMARY = "depth: leave out decoder blocks by their measured influence"
NEEDS = DENSE
WRITES, CHANGES = "model", "blocks"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT = MAIN
inputs = split_calibrated
fits = no_objection


class Options(StageOptions):
    """Options of `prune: {method: depth}`."""

    ratio: float = Field(default=0.2, gt=0, lt=1)
    """Share of the decoder blocks to leave out, rounded to whole blocks."""
    keep_first: int = Field(default=1, ge=0)
    """Blocks at the start that stay whatever their influence."""
    keep_last: int = Field(default=1, ge=0)
    """Blocks at the end that stay whatever their influence."""


def count_of(options: Options, facts: ModelFacts) -> int:
    """Return how many blocks will be left out."""
    return round(options.ratio * facts.layers)


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield why so many blocks can't be left out."""
    if facts.architecture is None:
        message = f"model_type {facts.model_type!r} is not one whose blocks are known"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {', '.join(architectures.names())}")
        return
    yield from refuse_experts(facts, "its blocks aren't taken apart here")
    yield from refuse_wrapped(facts, "isn't taken apart here")
    if facts.architecture.hybrid:
        message = (
            f"blocks of {facts.model_type} are of several kinds, and what would be left isn't known before they are"
        )
        fix = "use width, or start from another model"
        yield Problem(code="blocks-differ", message=message, fix=fix)
        return
    count, free = count_of(options, facts), facts.layers - options.keep_first - options.keep_last
    if count == 0:
        message = f"ratio {options.ratio} of {facts.layers} blocks is less than one block"
        yield Problem(code="nothing-to-prune", message=message, fix=f"use {1 / facts.layers:.2g}", loc=("ratio",))
    elif count > free:
        message = f"ratio {options.ratio} leaves out {count} of {facts.layers} blocks, and only {max(free, 0)} may go"
        yield Problem(code="too-many-blocks", message=message, fix="lower ratio or keep_first or keep_last")


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the shortened model; which blocks are gone isn't known yet."""
    gone = count_of(options, facts)
    layers = facts.layers - gone
    architecture = facts.architecture
    if architecture is None:
        return facts
    element = DTYPE_BYTES[facts.dtype]
    per_block = facts.linear_elements // facts.layers + 2 * facts.hidden
    kept = set(architecture.names(layers))
    return replace(
        facts,
        layers=layers,
        linears={name: shape for name, shape in facts.linears.items() if name in kept},
        weight_bytes=facts.weight_bytes - int(gone * per_block * element),
        config={**facts.config, architecture.keys["layers"]: layers},
    ).having("shortened")


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate one forward pass and one copy of the weights."""
    block = 4 * facts.linear_elements // max(facts.layers, 1)
    activations = 4 * calibration_tokens * facts.hidden
    return Estimate(
        seconds=10 + 2.5 * facts.linear_elements * calibration_tokens / 3e11,
        peak_bytes=450_000_000 + 2 * block + 4 * facts.vocab * facts.hidden + activations,
        disk_bytes=directory_bytes(after(options, facts).weight_bytes, facts.vocab),
        scratch_bytes=activations,
    )


def run(options: Options, job: Job) -> Facts:
    """Walk the blocks once, then write those that stay under new numbers."""
    from optikit.algorithms import depth
    from optikit.calibration.methods.depth import influences
    from optikit.calibration.write_checkpoint import write_shortened

    measured = influences(job, job.calibrated())
    count = round(options.ratio * len(measured))
    removed = depth.removed(measured, count, keep_first=options.keep_first, keep_last=options.keep_last)
    return {**write_shortened(job, removed), "influences": [round(value, 6) for value in measured]}
