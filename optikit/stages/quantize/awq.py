"""AWQ: 4-bit weights, with the input channels that carry most signal scaled up before rounding.

Paper   Lin et al. 2023, arXiv:2306.00978
Helps   decode at small batch, where weight bandwidth dominates; most at group sizes of 64 and more
Hurts   prefill on targets without an int4 kernel
Cost    one and a half forward passes per block, O(in²) float32 memory per linear, O(40·out·in²) time for the search
Differs scales are searched through Gram matrices over all calibration tokens instead of running blocks again; a value
        head's scale is shared by the query heads that read it, so that attention outputs can be scaled in grouped-query
        models too; `rounding: gptq` rounds the scaled weights by GPTQ; `correct` aims at the dense model's outputs;
        what the experts of a mixture read isn't scaled, because their router reads it too; what their down projections
        read is
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, no_objection, split_calibrated
from optikit.stages import _blockwise_cost
from optikit.stages._experts import ExpertOptions
from optikit.stages.quantize._grid import GridOptions, after_grid, check_grid, grid, ignored, quantization_config
from optikit.targets import Target

SUMMARY = "AWQ: 4-bit weights, salient channels scaled up before rounding"
NEEDS = DENSE
WRITES, CHANGES = "model", "folded"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT = MAIN
inputs = split_calibrated
fits = no_objection


class Options(GridOptions, ExpertOptions):
    """Options of `quantize: {method: awq}`."""

    bits: Literal[4] = 4
    """Bits per weight; the format knows no other."""
    format: Literal["awq", "pack-quantized"] = "awq"  # type: ignore[assignment]  # a grid of another family of formats
    """How it is written: `awq`, which most engines read, or `pack-quantized` of compressed-tensors."""
    sym: bool = False
    """Fix the zero point in the middle of the codes instead of storing one per group."""
    steps: int = Field(default=20, ge=1, le=200)
    """Exponents told apart in the search of scales, per group of linears and for each of two families."""
    clip: bool = True
    """Search the range of every group with the least error, instead of spanning its extremes."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """How the scaled weights are rounded: each to its nearest code, or by GPTQ: better, and slower."""
    damp: float = Field(default=0.01, gt=0, le=1)
    """With `rounding: gptq`: added to the Hessian's diagonal, as a fraction of the diagonal's mean."""
    correct: bool = True
    """Aim at the dense model's outputs, making up for what the layers before have lost. Doubles the forward passes."""
    correct_damp: float = Field(default=0.05, gt=0, le=10)
    """What holds a weight back from being corrected: added to the Hessian's diagonal, as a fraction of its mean; more
    than that where there are fewer than ten calibration tokens for each input channel."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be packed."""
    yield from check_grid(options, facts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model: same shapes, fewer bytes, no longer dense."""
    return after_grid(options, facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate a walk with Gram matrices, and the search of scales through them."""
    times = 2 if options.correct else 1
    searched = 1e-10 * options.steps * facts.hidden  # every candidate's error is a product with a Gram matrix
    written = after(options, facts).weight_bytes
    return _blockwise_cost.estimate(
        facts,
        calibration_tokens,
        passes=times,
        grams=times,
        seconds_per_weight=searched,
        written_bytes=written,
        held=_blockwise_cost.PAIRED if options.correct else _blockwise_cost.GRAM,
    )


def run(options: Options, job: Job) -> Facts:
    """Walk the blocks, quantizing each on the outputs of the quantized ones before it."""
    from optikit.calibration import blockwise
    from optikit.calibration.methods.awq import Awq
    from optikit.calibration.write_checkpoint import ScaledLayout
    from optikit.formats.packing import integers
    from optikit.models.reader import read

    packing = integers(options.format, options.bits, sym=options.sym)
    config = quantization_config(options, read(job.source))
    method = Awq(
        ScaledLayout(dtypes=packing.dtypes, unpack=packing.dequantize, config=config),
        packing,
        grid=grid(options, search=options.clip),
        steps=options.steps,
        damp=options.damp if options.rounding == "gptq" else None,
        correct_damp=options.correct_damp if options.correct else None,
    )
    ignore = partial(ignored, patterns=options.ignore)
    facts, rows = blockwise.run(job, method, identity=f"awq {options!r}", ignore=ignore, experts=options.experts)
    return {**facts, **findings(rows)}


def findings(rows: Mapping[str, Mapping[str, Any]]) -> Facts:
    """Return what the walk found out about scales and errors, over all linears."""
    losses = {name: row["loss"] for name, row in rows.items()}
    worst = max(losses, key=losses.__getitem__)
    return {
        "linears_scaled": sum(row["alpha"] is not None for row in rows.values()),
        "relative_loss_mean": round(sum(losses.values()) / len(losses), 6),
        "relative_loss_max": {"linear": worst, "value": round(losses[worst], 6)},
    }
