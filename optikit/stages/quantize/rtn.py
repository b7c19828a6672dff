"""Round to nearest: every weight to the closest point of its group's grid, without looking at any data.

Paper   none; the trivial baseline that every other method here is judged against
Helps   first looks, and 8 bits, where it loses next to nothing
Hurts   4 bits on small models: SmolLM2-135M loses about three times as much as with gptq
Cost    seconds; the memory of a strip of one linear, however large the model
Differs the scale is searched by squared error over 80 clipping ratios (`mse: true`), where most tools take the extremes
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, directory_bytes, no_objection, no_row, nothing
from optikit.stages import _blockwise_cost
from optikit.stages.quantize._grid import GridOptions, after_grid, check_grid, grid, ignored, quantization_config
from optikit.targets import Target

SUMMARY = "round to nearest: 4- or 8-bit weights without calibration"
NEEDS = DENSE
WRITES, CHANGES = "model", "linears"
USES_TARGET = False
LIBRARIES = ("torch", "safetensors")
ENVIRONMENT = MAIN
inputs = nothing
fits = no_objection
needs_row = no_row


class Options(GridOptions):
    """Options of `quantize: {method: rtn}`."""

    mse: bool = True
    """Search the scale with the least squared error per group, instead of spanning the extremes."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be packed."""
    yield from check_grid(options, facts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model."""
    return after_grid(options, facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from the count of weights: the grid search reads each about a hundred times."""
    written = after(options, facts).weight_bytes
    return Estimate(
        seconds=3 + facts.linear_elements * (4e-8 if options.mse else 1e-9),
        peak_bytes=_blockwise_cost.data_free_peak(facts),
        disk_bytes=directory_bytes(written, facts.vocab),
        scratch_bytes=written,
    )


def run(options: Options, job: Job) -> Facts:
    """Round every linear of every block."""
    from optikit.algorithms import rtn
    from optikit.calibration import blockwise
    from optikit.calibration.methods.rounding import DataFreeRounding
    from optikit.calibration.write_checkpoint import grid_layout
    from optikit.models.reader import read

    chosen = grid(options, search=options.mse)
    layout = grid_layout(options.format, chosen, quantization_config(options, read(job.source)))
    method = DataFreeRounding(layout, kernel=rtn.quantize)
    ignore = partial(ignored, patterns=options.ignore)
    return blockwise.run(job, method, identity=f"rtn {options!r}", ignore=ignore).facts
