"""GPTQ by llm-compressor 0.14: its weights, in `gptq` packing.

Paper   Frantar et al. 2022, arXiv:2210.17323
Helps   to compare with, or to get, exactly what llm-compressor makes
Hurts   memory: the whole model, and every block's Hessians
Cost    two forward passes per block, O(in²) float32 memory per linear, O(out·in²) time
Differs what it saves as `compressed-tensors` is repacked word by word, for engines that read `gptq`: same codes, same
        scales, zero points in the middle
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optikit.errors import StageFailedError
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, Estimate, Facts, Job, StageOptions, calibrated, directory_bytes, no_objection
from optikit.stages.quantize import gptq as ours
from optikit.stages.quantize._grid import ignored, quantization_config
from optikit.targets import Target

if TYPE_CHECKING:
    from pathlib import Path

    from optikit.formats.checkpoint import Checkpoint, Entry

SUMMARY = "GPTQ by llm-compressor 0.14, in an environment of its own"
NEEDS = DENSE
WRITES = "model"
USES_TARGET = False
LIBRARIES = ("llmcompressor", "compressed-tensors", "torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT: str | None = "llm-compressor"
inputs = calibrated
fits = no_objection


class Options(StageOptions):
    """Options of `quantize: {method: gptq, backend: llm-compressor}`."""

    bits: Literal[4, 8] = 4
    """Bits per weight."""
    group_size: Literal[32, 64, 128, -1] = 64
    """Weights in a row that share a scale; smaller is better quality and a larger file. -1 is the whole row."""
    ignore: tuple[str, ...] = ()
    """Linears to leave dense: ends of names (`mlp.down_proj`) or patterns (`*.layers.0.*`)."""
    act_order: bool = True
    """Round the columns with the largest activations first. Groups stay where they are (`actorder: static`)."""
    damp: float = Field(default=0.01, gt=0, le=1)
    """Added to the Hessian's diagonal before it is inverted, as a fraction of the diagonal's mean."""


def grid_of(options: Options) -> ours.Options:
    """Return our options of the same grid."""
    return ours.Options(bits=options.bits, group_size=options.group_size, ignore=options.ignore, damp=options.damp)


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be packed."""
    yield from ours.check(grid_of(options), facts, target)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model."""
    return ours.after(grid_of(options), facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from the shapes: two forward passes, Hessians, and rounding column by column."""
    operations = 8.0 * facts.linear_elements * calibration_tokens
    written = after(options, facts).weight_bytes
    return Estimate(
        seconds=20 + operations / 2e11 + facts.linear_elements / 2e6,
        peak_bytes=600_000_000 + 3 * facts.weight_bytes // 2 + 4 * calibration_tokens * facts.hidden,
        disk_bytes=directory_bytes(written, facts.vocab),
        scratch_bytes=3 * written,
    )


def run(options: Options, job: Job) -> Facts:
    """Let llm-compressor quantize and save, repack what it saved, and hold it to the promise of any GPTQ stage."""
    from optikit.algorithms.grid import Grid
    from optikit.calibration.method import Walked
    from optikit.calibration.source_model import SourceModel
    from optikit.calibration.write_checkpoint import grid_layout
    from optikit.formats.checkpoint import Checkpoint
    from optikit.models.reader import read

    stored = SourceModel(Checkpoint(job.source))
    names = [
        linear.name for block in range(stored.layers) for group in stored.groups(block, _nothing) for linear in group
    ]
    linears = tuple(name for name in names if not ignored(name, options.ignore))
    made = Checkpoint(_quantized(options, job, [name for name in names if name not in linears]))
    _require_untouched(stored.checkpoint, made, linears)
    packed, differing = _repacked(made, linears, options, job)
    untouched = {n: entry for n, entry in stored.checkpoint.entries.items() if n.removesuffix(".weight") not in linears}
    config = quantization_config(grid_of(options), read(job.source), damp_percent=options.damp)
    layout = grid_layout("gptq", Grid(bits=options.bits, group_size=options.group_size, sym=True), config)
    facts = layout.write(job, Walked(entries={**untouched, **packed}, linears=linears, ignore=_nothing))
    return {**facts, "reader_mismatches": differing}


def _nothing(name: str) -> bool:
    """Leave no linear dense."""
    return False


def _quantized(options: Options, job: Job, dense: list[str]) -> Path:
    """Return the directory that llm-compressor saved."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    from optikit.calibration.calibration_set import draw

    wanted = job.calibrated()
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    windows = draw(job.source, wanted.text, samples=wanted.samples, length=wanted.length, seed=job.seed)
    grid: dict[str, Any] = {"strategy": "channel"}
    if options.group_size > 0:
        grid = {"strategy": "group", "group_size": options.group_size}
    weights = QuantizationArgs(num_bits=options.bits, type="int", symmetric=True, **grid)
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head", *dense],
        dampening_frac=options.damp,
        actorder="static" if options.act_order else None,
    )
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype="auto", local_files_only=True)
    job.progress(0, 1, "oneshot")
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}),
        recipe=recipe,
        max_seq_length=wanted.length,
        num_calibration_samples=wanted.samples,
        shuffle_calibration_samples=False,
    )
    made = job.scratch / "made"
    model.save_pretrained(made, save_compressed=True)
    return made


def _require_untouched(source: Checkpoint, made: Checkpoint, linears: tuple[str, ...]) -> None:
    """Hold the library to what it shouldn't touch: every tensor outside the quantized linears has its old bytes."""
    from optikit.formats.checkpoint import same_bytes

    for name, entry in source.entries.items():
        if name.removesuffix(".weight") not in linears and not same_bytes(entry, made.entries.get(name, entry)):
            raise StageFailedError(f"llm-compressor changed {name}", fix="use backend optikit")


def _repacked(made: Checkpoint, linears: tuple[str, ...], options: Options, job: Job) -> tuple[dict[str, Entry], int]:
    """Return the linears in `gptq` packing, and how many weights the library reads otherwise than they will be."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    from optikit.formats import compressed_tensors, gptq
    from optikit.formats.checkpoint import locate, save_tensors

    entries: dict[str, Entry] = {}
    differing = 0
    for index, name in enumerate(linears):
        words, scales = (made.read(f"{name}.{suffix}") for suffix in ("weight_packed", "weight_scale"))
        tensors = compressed_tensors.as_gptq(words, scales, options.bits)
        file = job.scratch / f"linear-{index:05}.safetensors"
        save_tensors(file, {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
        entries |= locate(file)
        codes, own_scales, zeros = gptq.unpack(tensors, options.bits)
        theirs = unpack_from_int32(words, options.bits, codes.shape).float().unflatten(1, (scales.shape[1], -1))
        read = (theirs * scales.float()[..., None]).flatten(1)
        differing += int((gptq.dequantize(codes, own_scales, zeros) != read).sum())
        job.progress(index + 1, len(linears), "linears repacked")
    return entries, differing
