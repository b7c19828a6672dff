"""NF4: 4-bit weights on the quantiles of a normal distribution, in the bitsandbytes format that transformers serves.

Paper   Dettmers et al. 2023, arXiv:2305.14314 (QLoRA), section 3
Helps   memory, without any calibration: a fifth less squared error on normal weights than 4-bit integers that span the
        extremes of the same blocks, and as much as they have once their scales are searched (`rtn`)
Hurts   speed: weights are made float again for every forward pass; and few servers load it
Cost    seconds; the memory of a strip of one linear, however large the model
Differs the constants of blocks round to the nearest 8-bit value where bitsandbytes' CPU kernel takes a neighbour for
        one in five hundred; everything else is the same bit for bit
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, StageOptions, directory_bytes, no_objection, nothing
from optikit.stages import _blockwise_cost
from optikit.stages.quantize._grid import GridOptions, check_grid, chosen, ignored
from optikit.targets import Target

SUMMARY = "NF4: 4-bit weights without calibration, for transformers with bitsandbytes"
NEEDS = DENSE
WRITES, CHANGES = "model", "linears"
USES_TARGET = False
LIBRARIES = ("torch", "safetensors")
ENVIRONMENT = MAIN
inputs = nothing
fits = no_objection

SERVER = "transformers"
BLOCK = 64
"""Weights that share a constant. Inputs have to be a multiple of it for bitsandbytes' kernel on the CPU, which takes a
row to begin with a block: nine weights of ten came back wrong where it doesn't (0.50.2, measured 2026-11-22)."""
COMPUTE = {"F16": "float16", "F32": "float32"}
"""What a server computes in, by the dtype of the source; bfloat16 for every other."""
STATE_BYTES = 170
"""Of the JSON that goes with a linear, about."""


class Options(StageOptions):
    """Options of `quantize: {method: nf4}`."""

    double_quant: bool = True
    """Quantize the constants of blocks too, to 8 bits: 4.13 bits per weight instead of 4.5, at next to no loss."""
    ignore: tuple[str, ...] = ()
    """Linears to leave dense: ends of names (`mlp.down_proj`) or patterns (`*.layers.0.*`)."""


def _grid(options: Options) -> GridOptions:
    """Return what the checks of names ask; widths are a matter of who serves."""
    return GridOptions(group_size=-1, ignore=options.ignore)


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what has no linears to quantize, or can't be served on the target."""
    yield from (problem for problem in check_grid(_grid(options), facts) if problem.code != "packing-divides-shape")
    if SERVER not in target.engines:
        message = f"nf4 is served by {SERVER} with bitsandbytes, which doesn't run on {target.name}"
        yield Problem(code="scheme-not-served", message=message, fix="use gptq or awq", loc=("method",))
    architecture = facts.architecture
    if architecture is not None and architecture.transposed:
        message = f"nf4 isn't proven here for {facts.model_type}, which stores its weights transposed"
        yield Problem(code="scheme-not-served", message=message, fix="use gptq or rtn", loc=("method",))
    odd = {name: width for name, (_, width) in chosen(_grid(options), facts).items() if width % BLOCK}
    if odd and target.device == "cpu":
        name, width = next(iter(odd.items()))
        message = f"bitsandbytes 0.50 reads {name} wrongly on a CPU: its {width} inputs aren't a multiple of {BLOCK}"
        fix = f"use method rtn, or ignore {name.rpartition('.')[2]!r}"
        yield Problem(code="block-divides-width", message=message, fix=fix, loc=("method",))


def quantization_config(options: Options, facts: ModelFacts) -> dict[str, Any]:
    """Return config.json's `quantization_config`, as transformers' BitsAndBytesConfig reads it."""
    architecture = facts.architecture
    head = [architecture.head] if architecture else []
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": options.double_quant,
        "bnb_4bit_compute_dtype": COMPUTE.get(facts.dtype, "bfloat16"),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [
            *head,
            *(name for name in facts.linears if ignored(name, options.ignore)),
            *facts.kept,
        ],
    }


def packed_bytes(shape: tuple[int, int], *, double_quant: bool) -> int:
    """Return the bytes of one packed linear (out_features, in_features): codes, constants, maps, state."""
    weights = shape[0] * shape[1]
    blocks = -(-weights // BLOCK)
    constants = blocks + 4 * -(-blocks // 256) + 4 * 256 if double_quant else 4 * blocks
    return -(-weights // 2) + constants + 4 * 16 + STATE_BYTES


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model."""
    linears = chosen(_grid(options), facts)
    element_bytes = 4 if facts.dtype == "F32" else 2
    dense = sum(rows * columns for rows, columns in linears.values()) * element_bytes
    packed = sum(packed_bytes(shape, double_quant=options.double_quant) for shape in linears.values())
    config = {**facts.config, "quantization_config": quantization_config(options, facts)}
    written = replace(facts, weight_bytes=facts.weight_bytes - dense + packed, config=config)
    return written.having("nf4", without=frozenset({"dense"}))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from the count of weights: each is compared with the levels, unpacked, compared with the dense one."""
    written = after(options, facts).weight_bytes
    return Estimate(
        seconds=4 + 8e-8 * facts.linear_elements,
        peak_bytes=_blockwise_cost.data_free_peak(facts),
        disk_bytes=directory_bytes(written, facts.vocab),
        scratch_bytes=written,
    )


def run(options: Options, job: Job) -> Facts:
    """Round every linear of every block."""
    from optikit.calibration import blockwise
    from optikit.calibration.methods.nf4 import Nf4
    from optikit.calibration.write_checkpoint import RoundedLayout
    from optikit.formats.packing import nf4_blocks
    from optikit.models.reader import read

    config = quantization_config(options, read(job.source))
    layout = RoundedLayout(packing=nf4_blocks(double_quant=options.double_quant), config=config)
    method = Nf4(layout, dtype=config["bnb_4bit_compute_dtype"])
    ignore = partial(ignored, patterns=options.ignore)
    return blockwise.run(job, method, identity=f"nf4 {options!r}", ignore=ignore).facts
