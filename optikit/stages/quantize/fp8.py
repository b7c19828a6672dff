"""FP8: weights and activations as 8-bit floats (E4M3), for GPUs and accelerators that multiply them.

Paper   Micikevicius et al. 2022, arXiv:2209.05433; block: DeepSeek-V3, arXiv:2412.19437, section 3.3.2
Helps   prefill, large batches and memory, at next to no loss, on Ada, Hopper, Blackwell and Trainium2
Hurts   nothing much where the hardware multiplies FP8; elsewhere servers keep the memory and lose the speed
Cost    dynamic, block: seconds, a strip of one linear in memory, however large the model; static, and kv_cache: one
        forward pass of calibration text
Differs linears that share their inputs share the scale of `static`, as servers want them fused: ModelOpt does the same
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
    Input,
    Job,
    StageOptions,
    directory_bytes,
    no_objection,
    no_row,
    nothing,
    split_calibrated,
)
from optikit.stages import _blockwise_cost
from optikit.stages.quantize._grid import GridOptions, check_grid, chosen, compressed_ignore, ignored
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.calibration.method import DataFreeMethod, Method

SUMMARY = "FP8: 8-bit float weights and activations, dynamic, static or in blocks of 128 x 128"
NEEDS = DENSE
WRITES, CHANGES = "model", "linears"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT = MAIN
fits = no_objection
needs_row = no_row

BLOCK = 128
TRAITS: Mapping[str, Trait] = {"dynamic": "fp8_dynamic", "static": "fp8_static", "block": "fp8_block"}
SERVERS: Mapping[str, tuple[str, ...]] = {
    "dynamic": ("vllm", "sglang", "tensorrt-llm"),
    "static": ("vllm", "sglang", "tensorrt-llm", "neuron", "vllm-neuron"),
    "block": ("vllm", "sglang", "tensorrt-llm", "transformers"),
}
"""What loads a scheme, as rows of targets name it."""
STORED = {"F16": "float16", "F32": "float32"}
"""Dtype of the scales of `dynamic`, by the dtype of the source; bfloat16 for every other."""


class Options(StageOptions):
    """Options of `quantize: {method: fp8}`."""

    scheme: Literal["dynamic", "static", "block"] = "dynamic"
    """dynamic: weights per channel, activations per token as they come; `compressed-tensors`. static: one scale for a
    linear's weights and one, calibrated, for its inputs; as ModelOpt writes it, and the only one for vLLM on Neuron.
    block: weights in blocks of 128 x 128, activations of 128 channels as they come; as DeepSeek writes it."""
    mse: bool = False
    """dynamic, block: choose each scale by squared error among ten instead of spanning the largest weight: 8 to 12 %
    less of it per channel, 2 to 4 % in blocks, for ten times the work. One scale for a whole linear gains nothing."""
    scale_max: Literal[448, 240] = 448
    """Largest code that is used. 240 for Neuron, whose E4M3 reads larger ones as no number."""
    kv_cache: bool = False
    """Write scales for keys and values in FP8, too, from the largest that calibration text has shown."""
    ignore: tuple[str, ...] = ()
    """Linears to leave dense: ends of names (`mlp.down_proj`) or patterns (`*.layers.0.*`)."""


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare calibration text, where a scale comes from it."""
    return split_calibrated(options) if options.scheme == "static" or options.kv_cache else nothing(options)


def _grid(options: Options) -> GridOptions:
    """Return what the checks of names ask."""
    return GridOptions(group_size=-1, ignore=options.ignore)


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what has no linears to quantize, doesn't fit into blocks, or can't be served on the target."""
    yield from (problem for problem in check_grid(_grid(options), facts) if problem.code != "packing-divides-shape")
    servers = SERVERS[options.scheme]
    if not set(servers) & set(target.engines):
        message = f"fp8, {options.scheme}, is served by {', '.join(servers)}, and none runs on {target.name}"
        yield Problem(code="scheme-not-served", message=message, fix="use gptq, awq or rtn", loc=("scheme",))
    architecture = facts.architecture
    if architecture is not None and architecture.transposed:
        message = f"fp8 has no kernel for the transposed weights of {facts.model_type}"
        yield Problem(code="scheme-not-served", message=message, fix="use gptq or rtn", loc=("method",))
    if options.kv_cache and facts.config.get("attn_logit_softcapping") is not None:
        message = f"the attention of {facts.model_type} caps its scores, and shows no keys and values to calibrate on"
        yield Problem(code="cache-not-calibrated", message=message, fix="set kv_cache: false", loc=("kv_cache",))
    if options.mse and options.scheme == "static":
        message = "mse does nothing to scheme static: another scale for a whole linear has the same error"
        repair = {"quantize": {"mse": False}}
        yield Problem(code="option-without-effect", message=message, fix="leave mse out", loc=("mse",), repair=repair)
    if options.scheme == "block":
        yield from _check_blocks(options, facts)


def _check_blocks(options: Options, facts: ModelFacts) -> Iterator[Problem]:
    """Yield the linears that blocks don't divide: kernels read whole blocks of inputs, and of fused outputs."""
    architecture = facts.architecture
    alone = {group[0] for group in architecture.groups if len(group) == 1} if architecture else set()
    for name, (rows, columns) in chosen(_grid(options), facts).items():
        fused = not any(name.endswith(f".{inside}") for inside in alone)
        if columns % BLOCK or (fused and rows % BLOCK):
            size, what = (columns, "inputs") if columns % BLOCK else (rows, "outputs")
            message = f"blocks of {BLOCK} don't divide the {size} {what} of {name}"
            fix = f"use scheme dynamic, or ignore {name.rpartition('.')[2]!r}"
            repair = {"quantize": {"scheme": "dynamic"}}
            yield Problem(code="block-divides-width", message=message, fix=fix, loc=("scheme",), repair=repair)
            return


def quantization_config(options: Options, facts: ModelFacts) -> dict[str, Any]:
    """Return config.json's `quantization_config`, as the servers of a scheme read it."""
    architecture = facts.architecture
    head = [architecture.head] if architecture else []
    left = [*head, *(name for name in facts.linears if ignored(name, options.ignore)), *facts.routers]
    float8: dict[str, Any] = {"num_bits": 8, "type": "float"}
    fixed = {**float8, "dynamic": False}
    if options.scheme == "static":
        both = {"weights": fixed, "input_activations": fixed, "targets": ["Linear"]}
        told = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": PRODUCER}
        told |= {"config_groups": {"group_0": both}, "ignore": [*left, *(f"{part}*" for part in facts.carried)]}
        return told | ({"kv_cache_scheme": fixed} if options.kv_cache else {})
    if options.scheme == "block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": [*left, *facts.carried],
        }
    symmetric = {**fixed, "symmetric": True, "group_size": None}
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {**symmetric, "strategy": "channel"},
        "input_activations": {**symmetric, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": compressed_ignore(facts, options.ignore),
        "kv_cache_scheme": {**fixed, "symmetric": True, "strategy": "tensor"} if options.kv_cache else None,
    }


PRODUCER = {"name": "modelopt", "version": "0.47 in layout, written by optikit"}
"""Whose layout it is: readers know the file by the name, and vLLM 0.32 doesn't look at the version."""


def sidecar(options: Options, facts: ModelFacts) -> dict[str, Any]:
    """Return the files beside config.json, by name: ModelOpt's own, which TensorRT-LLM reads first."""
    if options.scheme != "static":
        return {}
    config = quantization_config(options, facts)
    algorithms = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8" if options.kv_cache else None}
    told = {"producer": PRODUCER, "quantization": {**algorithms, "exclude_modules": config["ignore"]}}
    return {"hf_quant_config.json": told}


def _scale_bytes(options: Options, facts: ModelFacts, shape: tuple[int, int]) -> int:
    rows, columns = shape
    if options.scheme == "static":
        return 8
    if options.scheme == "block":
        return 4 * -(-rows // BLOCK) * -(-columns // BLOCK)
    return rows * (4 if facts.dtype == "F32" else 2)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model."""
    linears = chosen(_grid(options), facts)
    element_bytes = 4 if facts.dtype == "F32" else 2
    saved = sum(
        rows * columns * (element_bytes - 1) - _scale_bytes(options, facts, (rows, columns))
        for rows, columns in linears.values()
    )
    cache = 8 * facts.layers if options.kv_cache else 0
    config = {**facts.config, "quantization_config": quantization_config(options, facts)}
    written = replace(facts, weight_bytes=facts.weight_bytes - saved + cache, config=config)
    return written.having(TRAITS[options.scheme], without=frozenset({"dense"}))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate a walk where text is read; else one pass over the weights, ten with `mse`."""
    written = after(options, facts).weight_bytes
    if inputs(options):
        return _blockwise_cost.estimate(
            facts,
            calibration_tokens,
            passes=1,
            grams=0,
            seconds_per_weight=2e-8,
            written_bytes=written,
            held=_blockwise_cost.NORMS,
        )
    return Estimate(
        seconds=4 + facts.linear_elements * (9e-8 if options.mse else 1.5e-8),
        peak_bytes=_blockwise_cost.data_free_peak(facts),
        disk_bytes=directory_bytes(written, facts.vocab),
        scratch_bytes=written,
    )


def run(options: Options, job: Job) -> Facts:
    """Round every linear of every block."""
    from optikit.calibration import blockwise
    from optikit.calibration.cache_ranges import CacheRanges

    at_projections = options.scheme != "dynamic"
    cache = CacheRanges(at_projections=at_projections, largest=options.scale_max) if options.kv_cache else None
    ignore = partial(ignored, patterns=options.ignore)
    method = _method(options, job)
    facts, rows = blockwise.run(job, method, identity=f"fp8 {options!r}", ignore=ignore, cache=cache)
    seen = {name: row["largest_input"] for name, row in rows.items() if "largest_input" in row}
    if not seen:
        return facts
    widest = max(seen, key=seen.__getitem__)
    return {**facts, "largest_input": {"linear": widest, "value": seen[widest]}}


def _method(options: Options, job: Job) -> Method[Any] | DataFreeMethod:
    import torch

    from optikit.calibration.methods import fp8
    from optikit.calibration.write_checkpoint import RoundedLayout
    from optikit.formats import packing
    from optikit.models.reader import read

    facts = read(job.source)
    dtype = getattr(torch, STORED.get(facts.dtype, "bfloat16"))
    config, beside = quantization_config(options, facts), sidecar(options, facts)
    if options.scheme == "static":
        layout = RoundedLayout(packing=packing.MODELOPT_FP8, config=config, beside=beside)
        return fp8.Fp8Static(layout, largest=options.scale_max)
    largest = float(options.scale_max)
    if options.scheme == "block":
        rounds, packed = partial(fp8.by_block, largest=largest, search=options.mse), packing.FP8_BLOCK
    else:
        rounds = partial(fp8.by_channel, dtype=dtype, largest=largest, search=options.mse)
        packed = packing.float_quantized(dtype)
    layout = RoundedLayout(packing=packed, config=config)
    return fp8.Fp8Calibrated(layout, rounds) if options.kv_cache else fp8.Fp8Rows(layout, rounds)
