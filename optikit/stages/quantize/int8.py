"""INT8: 8-bit weights, alone (`w8a16`) or with activations rounded to 8 bits while serving (`w8a8`, `llm_int8`).

Paper   w8a8: Xiao et al. 2022, arXiv:2211.10438 (SmoothQuant); w8a16: Frantar et al. 2022, arXiv:2210.17323;
        llm_int8: Dettmers et al. 2022, arXiv:2208.07339
Helps   w8a8: prefill and large batches on targets with INT8 matrix units; w8a16: decode, with next to no loss;
        llm_int8: memory of models with extreme activations
Hurts   w8a8: models with extreme activations; w8a16: prefill on targets without an int8 weight kernel; llm_int8: speed,
        which is below that of half precision
Cost    one and a half forward passes per block, O(in²) float32 memory per linear
Differs w8a8 searches the migration strength for every group of linears (`smooth: search`) and folds scales into value
        and up projections too, where the paper smooths the inputs of norms only
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from optikit.models.facts import ModelFacts, Trait
from optikit.problems import Problem
from optikit.stage import (
    DENSE,
    MAIN,
    Estimate,
    Facts,
    Job,
    directory_bytes,
    no_objection,
    split_calibrated,
)
from optikit.stages import _blockwise_cost
from optikit.stages._experts import ExpertOptions
from optikit.stages.quantize._grid import GridOptions, after_grid, check_grid, chosen, compressed_ignore, ignored
from optikit.stages.quantize._grid import quantization_config as grid_config
from optikit.stages.quantize.awq import findings
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.calibration.method import DataFreeMethod, Method

SUMMARY = "INT8: 8-bit weights, and 8-bit activations with w8a8"
NEEDS = DENSE
WRITES, CHANGES = "model", "folded"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT = MAIN
inputs = split_calibrated
fits = no_objection


SERVERS = {"w8a8": "vllm", "llm_int8": "transformers"}
"""What loads a scheme; w8a16 is read by everything that reads `gptq`."""


class Options(ExpertOptions):
    """Options of `quantize: {method: int8}`."""

    scheme: Literal["w8a16", "w8a8", "llm_int8"] = "w8a16"
    """w8a16: weights only, in `gptq` 8-bit packing. w8a8: weights per channel and activations per token, in
    `compressed-tensors` packing, which vLLM serves. llm_int8: the same without outlier channels, in `bitsandbytes`
    packing, which transformers serves."""
    group_size: Literal[32, 64, 128, -1] = 128
    """w8a16: weights in a row that share a scale; -1 is the whole row."""
    sym: bool = True
    """w8a16: fix the zero point in the middle of the codes. False stores one per group."""
    format: Literal["gptq", "pack-quantized"] = "gptq"
    """w8a16: how it is written: `gptq`, which most engines read, or `pack-quantized` of compressed-tensors."""
    smooth: Literal["search", "none"] | Annotated[float, Field(gt=0, le=1)] = "search"
    """w8a8: how much of the difficulty moves from activations to weights: the best of ten strengths for every group
    of linears, one fixed strength, or nothing."""
    threshold: float = Field(default=6.0, ge=0)
    """llm_int8: input channels with a magnitude above this are multiplied in half precision; 0 for none."""
    ignore: tuple[str, ...] = ()
    """Linears to leave dense: ends of names (`mlp.down_proj`) or patterns (`*.layers.0.*`)."""


def needs_row(options: Options) -> str:
    """Say what scheme w8a8 or llm_int8 needs a row for."""
    return {"w8a8": "what each scale is folded into", "llm_int8": "the name of its head"}.get(options.scheme, "")


def grid_of(options: Options) -> GridOptions:
    """Return the grid of the weights."""
    size = options.group_size if options.scheme == "w8a16" else -1
    return GridOptions(bits=8, group_size=size, sym=options.sym, format=options.format, ignore=options.ignore)


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be packed, or can't be served on the target."""
    yield from check_grid(grid_of(options), facts)
    server = SERVERS.get(options.scheme)
    if server is not None and server not in target.engines:
        message = f"{options.scheme} is served by {server}, which doesn't run on {target.name}"
        yield Problem(code="scheme-not-served", message=message, fix="use scheme w8a16", loc=("scheme",))
    architecture = facts.architecture
    if options.scheme != "w8a16" and architecture is not None and architecture.transposed:
        message = f"{options.scheme} has no kernel for the transposed weights of {facts.model_type}"
        yield Problem(code="scheme-not-served", message=message, fix="use scheme w8a16", loc=("scheme",))


def _head(facts: ModelFacts) -> list[str]:
    architecture = facts.architecture
    return [architecture.head] if architecture else []


def quantization_config(options: Options, facts: ModelFacts) -> dict[str, Any]:
    """Return config.json's `quantization_config` of an `int-quantized` or `bitsandbytes` checkpoint."""
    if options.scheme == "llm_int8":
        skipped = [name for name in facts.linears if ignored(name, options.ignore)]
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": options.threshold,
            "llm_int8_skip_modules": [*_head(facts), *skipped, *facts.kept],
        }
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**int8, "strategy": "channel", "dynamic": False},
                "input_activations": {**int8, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": compressed_ignore(facts, options.ignore),
        "kv_cache_scheme": None,
    }


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model."""
    if options.scheme == "w8a16":
        return after_grid(grid_of(options), facts)
    linears = chosen(grid_of(options), facts)
    element_bytes = 4 if facts.dtype == "F32" else 2
    scale_bytes = 4 if options.scheme == "llm_int8" else element_bytes
    saved = sum(rows * columns * (element_bytes - 1) - rows * scale_bytes for rows, columns in linears.values())
    config = {**facts.config, "quantization_config": quantization_config(options, facts)}
    written = replace(facts, weight_bytes=facts.weight_bytes - saved, config=config)
    trait: Trait = "int8_llm" if options.scheme == "llm_int8" else "int8_w8a8"
    return written.having(trait, without=frozenset({"dense"}))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate a walk with Gram matrices; LLM.int8 only rounds."""
    written = after(options, facts).weight_bytes
    if options.scheme == "llm_int8":
        return Estimate(
            seconds=4 + 1e-8 * facts.linear_elements,
            peak_bytes=_blockwise_cost.data_free_peak(facts),
            disk_bytes=directory_bytes(written, facts.vocab),
            scratch_bytes=written,
        )
    return _blockwise_cost.estimate(
        facts,
        calibration_tokens,
        passes=1,
        grams=1,
        seconds_per_weight=4e-7,
        written_bytes=written,
        held=_blockwise_cost.GRAM,
    )


def run(options: Options, job: Job) -> Facts:
    """Walk the blocks, quantizing each on the outputs of the quantized ones before it."""
    from optikit.calibration import blockwise

    make: dict[str, Callable[[Options, Job], Method[Any] | DataFreeMethod]] = {
        "w8a16": _weights_only,
        "w8a8": _with_activations,
        "llm_int8": _llm_int8,
    }
    ignore = partial(ignored, patterns=options.ignore)
    facts, rows = blockwise.run(
        job, make[options.scheme](options, job), identity=f"int8 {options!r}", ignore=ignore, experts=options.experts
    )
    return {**facts, **findings(rows)} if options.scheme == "w8a8" else facts


def _weights_only(options: Options, job: Job) -> Method[Any]:
    from optikit.algorithms import gptq
    from optikit.algorithms.grid import Grid
    from optikit.calibration.methods.rounding import GramRounding
    from optikit.calibration.write_checkpoint import grid_layout
    from optikit.models.reader import read

    grid = Grid(bits=8, group_size=options.group_size, sym=options.sym)
    layout = grid_layout(options.format, grid, grid_config(grid_of(options), read(job.source)))
    return GramRounding(layout, kernel=partial(gptq.quantize, damp=0.01, act_order=True))


def _with_activations(options: Options, job: Job) -> Method[Any]:
    import torch

    from optikit.algorithms import smoothquant
    from optikit.calibration.methods.int8 import W8A8
    from optikit.calibration.write_checkpoint import ScaledLayout
    from optikit.formats import compressed_tensors
    from optikit.models.reader import read

    facts = read(job.source)
    dtype = {"F16": torch.float16, "F32": torch.float32}.get(facts.dtype, torch.bfloat16)
    searched = {"search": smoothquant.STRENGTHS, "none": ()}
    strengths = searched[options.smooth] if isinstance(options.smooth, str) else (options.smooth,)
    layout = ScaledLayout(
        dtypes={"weight": torch.int8, "weight_scale": dtype},
        unpack=compressed_tensors.dequantize,
        config=quantization_config(options, facts),
    )
    return W8A8(layout, dtype=dtype, strengths=strengths)


def _llm_int8(options: Options, job: Job) -> DataFreeMethod:
    from optikit.calibration.methods.int8 import LlmInt8
    from optikit.calibration.write_checkpoint import RoundedLayout
    from optikit.formats.packing import LLM_INT8
    from optikit.models.reader import read

    return LlmInt8(RoundedLayout(packing=LLM_INT8, config=quantization_config(options, read(job.source))))
