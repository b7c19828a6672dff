"""GPTQ: round weights one column at a time, moving each error onto columns not yet rounded.

Paper   Frantar et al. 2022, arXiv:2210.17323, Algorithm 1
Helps   decode at small batch, where weight bandwidth dominates
Hurts   prefill on targets without an int4 kernel
Cost    five forward passes per block, O(in²) float32 memory per linear, O(out·in²) time
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from pydantic import Field

from optikit.errors import StageFailedError
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, no_objection, no_row, split_calibrated
from optikit.stages import _blockwise_cost
from optikit.stages._experts import ExpertOptions
from optikit.stages.quantize._grid import GridOptions, after_grid, check_grid, grid, ignored, quantization_config
from optikit.targets import Target

SUMMARY = "GPTQ: 4- or 8-bit weights, rounding guided by calibration text"
NEEDS = DENSE
WRITES, CHANGES = "model", "linears"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT = MAIN
inputs = split_calibrated
fits = no_objection
needs_row = no_row


class Options(GridOptions, ExpertOptions):
    """Options of `quantize: {method: gptq}`."""

    act_order: bool = True
    """Round the columns with the largest activations first. Groups stay where they are, so any kernel can read it."""
    mse: bool = True
    """Search the scale with the least squared error per group, instead of spanning the extremes."""
    damp: float = Field(default=0.01, gt=0, le=1)
    """Added to the Hessian's diagonal before it is inverted, as a fraction of the diagonal's mean."""
    correct: bool = True
    """Aim at the dense model's outputs, making up for what the layers before have lost. Doubles the forward passes."""
    correct_damp: float = Field(default=0.05, gt=0, le=10)
    """What holds a weight back from being corrected: added to the Hessian's diagonal, as a fraction of its mean; more
    than that where there are fewer than ten calibration tokens for each input channel."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be packed."""
    yield from check_grid(options, facts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model."""
    return after_grid(options, facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate a walk with Hessians, beside the dense model where it corrects."""
    times = 2 if options.correct else 1
    written = after(options, facts).weight_bytes
    return _blockwise_cost.estimate(
        facts,
        calibration_tokens,
        passes=times,
        grams=times,
        seconds_per_weight=5e-7,
        written_bytes=written,
        held=_blockwise_cost.PAIRED if options.correct else _blockwise_cost.GRAM,
    )


def run(options: Options, job: Job) -> Facts:
    """Walk the blocks, quantizing each on the outputs of the quantized ones before it."""
    from optikit.algorithms import gptq
    from optikit.calibration import blockwise
    from optikit.calibration.methods.rounding import GramRounding
    from optikit.calibration.write_checkpoint import grid_layout
    from optikit.models.reader import read

    chosen = grid(options, search=options.mse)
    config = quantization_config(options, read(job.source), damp_percent=options.damp)
    method = GramRounding(
        grid_layout(options.format, chosen, config),
        kernel=partial(gptq.quantize, damp=options.damp, act_order=options.act_order),
        correct_damp=options.correct_damp if options.correct else None,
    )
    ignore = partial(ignored, patterns=options.ignore)
    facts, rows = blockwise.run(job, method, identity=f"gptq {options!r}", ignore=ignore, experts=options.experts)
    return {**facts, **_findings(rows)}


def _require_done(undone: list[str], rows: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse a result in which every linear was rounded to nearest: it isn't what was asked for."""
    if len(undone) == len(rows):
        message = f"no Hessian could be factored, of {next(iter(rows))} and {len(rows) - 1} more: GPTQ did nothing"
        raise StageFailedError(message, fix="use other calibration text, or method rtn")


def _findings(rows: Mapping[str, Mapping[str, float]]) -> Facts:
    losses = {name: row["loss"] for name, row in rows.items()}
    worst = max(losses, key=losses.__getitem__)
    damped = {name: row["damp"] for name, row in rows.items() if row["damp"] != row["damp_asked"]}
    few = [name for name, row in rows.items() if row.get("too_few_tokens")]
    undone = [name for name, damp in damped.items() if damp == 0]
    _require_done(undone, rows)
    return {
        "relative_loss_mean": round(sum(losses.values()) / len(losses), 6),
        "relative_loss_max": {"linear": worst, "value": round(losses[worst], 6)},
        "rtn_fallback": [*few, *(name for name in undone if name not in few)],
        "damping_increased": [name for name, damp in damped.items() if damp > 0],
    }
