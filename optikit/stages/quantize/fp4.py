"""FP4: weights as 4-bit floats (E2M1) in groups of 16 or 32 inputs, activations as they are; no calibration.

Paper   NVFP4: NVIDIA 2025, arXiv:2509.25149; MXFP4: Rouhani et al. 2023, arXiv:2310.10537; scales below the largest
        weight: Cook et al. 2025, arXiv:2512.02010
Helps   memory and decode like 4-bit integers, on Blackwell at full speed; of normal weights nvfp4 (4.5 bits) loses
        0.7 % of their squares, mxfp4 (4.25 bits) 1.2 %
Hurts   quality beside integers of the same size: rtn in groups of 32 loses 0.66 %, of 64 0.81 %, and gptq and awq far
        less in outputs; nothing before Ampere and no CPU has a kernel
Cost    seconds; the memory of a strip of one linear, however large the model; nvfp4 reads the weights twice
Differs each scale has the least squared error of several (`mse: true`), where most tools span the largest weight;
        linears that share their inputs share the global scale of nvfp4, as vLLM wants them fused
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from optikit.models.facts import ModelFacts, Trait
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
    no_row,
    nothing,
)
from optikit.stages import _blockwise_cost
from optikit.stages.quantize._grid import GridOptions, check_grid, chosen, compressed_ignore, ignored
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.calibration.method import DataFreeMethod

SUMMARY = "FP4: 4-bit float weights without calibration, NVFP4 or MXFP4, for vLLM on GPUs"
NEEDS = DENSE
WRITES, CHANGES = "model", "linears"
USES_TARGET = False
LIBRARIES = ("torch", "safetensors")
ENVIRONMENT = MAIN
inputs = nothing
fits = no_objection
needs_row = no_row

SERVER = "vllm"
TRAITS: Mapping[str, Trait] = {"nvfp4": "nvfp4_packed", "mxfp4": "mxfp4_packed"}
GROUPS = {"nvfp4": 16, "mxfp4": 32}
SCALE_DTYPES = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}


class Options(StageOptions):
    """Options of `quantize: {method: fp4}`."""

    scheme: Literal["nvfp4", "mxfp4"] = "nvfp4"
    """nvfp4: groups of 16 inputs with 8-bit float scales, and one scale for a linear; `nvfp4-pack-quantized`. mxfp4:
    groups of 32 whose scales are powers of two; `mxfp4-pack-quantized`."""
    mse: bool = True
    """Choose each scale by squared error (of eight for nvfp4, of two for mxfp4) instead of spanning the largest weight:
    22 % less of it for nvfp4, half a per cent for mxfp4, at several times the work."""
    ignore: tuple[str, ...] = ()
    """Linears to leave dense: ends of names (`mlp.down_proj`) or patterns (`*.layers.0.*`)."""


def _grid(options: Options) -> GridOptions:
    """Return what the checks of names ask."""
    return GridOptions(group_size=-1, ignore=options.ignore)


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what has no linears to quantize, doesn't fit into groups, or can't be served on the target."""
    yield from (problem for problem in check_grid(_grid(options), facts) if problem.code != "packing-divides-shape")
    if SERVER not in target.engines:
        message = f"fp4 is served by {SERVER}, which doesn't run on {target.name}"
        yield Problem(code="scheme-not-served", message=message, fix="use gptq, awq or fp8", loc=("method",))
    architecture = facts.architecture
    if architecture is not None and architecture.transposed:
        message = f"fp4 has no kernel for the transposed weights of {facts.model_type}"
        yield Problem(code="scheme-not-served", message=message, fix="use gptq or rtn", loc=("method",))
    group = GROUPS[options.scheme]
    odd = {name: width for name, (_, width) in chosen(_grid(options), facts).items() if width % group}
    if odd:
        name, width = next(iter(odd.items()))
        message = f"groups of {group} don't divide the {width} inputs of {name}"
        fix = f"use method rtn, or ignore {name.rpartition('.')[2]!r}"
        yield Problem(code="block-divides-width", message=message, fix=fix, loc=("scheme",))


def quantization_config(options: Options, facts: ModelFacts) -> dict[str, Any]:
    """Return config.json's `quantization_config`, as compressed-tensors reads it: NVFP4A16 or MXFP4A16."""
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if options.scheme == "nvfp4" else "group",
        "group_size": GROUPS[options.scheme],
        "dynamic": False,
        "scale_dtype": SCALE_DTYPES[options.scheme],
        "zp_dtype": SCALE_DTYPES[options.scheme],
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{options.scheme}-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": compressed_ignore(facts, options.ignore),
        "kv_cache_scheme": None,
    }


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model."""
    linears = chosen(_grid(options), facts)
    elements = sum(rows * columns for rows, columns in linears.values())
    packed = elements // 2 + elements // GROUPS[options.scheme] + (4 * len(linears) if options.scheme == "nvfp4" else 0)
    dense = elements * (4 if facts.dtype == "F32" else 2)
    config = {**facts.config, "quantization_config": quantization_config(options, facts)}
    written = replace(facts, weight_bytes=facts.weight_bytes - dense + packed, config=config)
    return written.having(TRAITS[options.scheme], without=frozenset({"dense"}))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate one pass over the weights, or one for every scale that is tried."""
    written = after(options, facts).weight_bytes
    tried = {"nvfp4": 8, "mxfp4": 2}[options.scheme] if options.mse else 1
    return Estimate(
        seconds=4 + facts.linear_elements * 2e-8 * (2 + tried),
        peak_bytes=_blockwise_cost.data_free_peak(facts),
        disk_bytes=directory_bytes(written, facts.vocab),
        scratch_bytes=written,
    )


def run(options: Options, job: Job) -> Facts:
    """Round every linear of every block."""
    from optikit.calibration import blockwise

    ignore = partial(ignored, patterns=options.ignore)
    return blockwise.run(job, _method(options, job), identity=f"fp4 {options!r}", ignore=ignore).facts


def _method(options: Options, job: Job) -> DataFreeMethod:
    from optikit.calibration.methods import fp4
    from optikit.calibration.source_model import SourceModel
    from optikit.calibration.write_checkpoint import RoundedLayout
    from optikit.formats import packing
    from optikit.formats.checkpoint import Checkpoint
    from optikit.models.reader import read

    config = quantization_config(options, read(job.source))
    if options.scheme == "mxfp4":
        return fp4.Mxfp4Rows(RoundedLayout(packing=packing.MXFP4, config=config), search=options.mse)
    ignore = partial(ignored, patterns=options.ignore)
    common = fp4.global_scales(SourceModel(Checkpoint(job.source)), ignore)
    return fp4.Nvfp4Rows(RoundedLayout(packing=packing.NVFP4, config=config), common=common, search=options.mse)
