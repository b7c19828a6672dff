"""GPTQ by GPTQModel 7.6: its weights, as it packs them.

Paper   Frantar et al. 2022, arXiv:2210.17323; order of columns: ModelCloud's group aware reordering (GAR)
Helps   to compare with, or to get, exactly what GPTQModel makes
Hurts   time: its packages are imported for 10 to 30 s; memory: the whole model, and a group's inputs of every sample
Cost    two forward passes per block, O(in²) float32 memory per linear, O(out·in²) time
Differs groups stay where they are, so `desc_act` is always false: engines that read `gptq` want it so
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
from optikit.stages.quantize._grid import chosen, ignored, quantization_config
from optikit.targets import Target

if TYPE_CHECKING:
    from pathlib import Path

    from optikit.formats.checkpoint import Checkpoint

SUMMARY = "GPTQ by GPTQModel 7.6, in an environment of its own"
NEEDS = DENSE
WRITES = "model"
USES_TARGET = False
LIBRARIES = ("gptqmodel", "torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT: str | None = "gptqmodel"
inputs = calibrated
fits = no_objection
PACKED = 32
"""Inputs and outputs that it packs at a time (nn_modules/qlinear/__init__.py, pack_block)."""


class Options(StageOptions):
    """Options of `quantize: {method: gptq, backend: gptqmodel}`."""

    bits: Literal[4, 8] = 4
    """Bits per weight."""
    group_size: Literal[32, 64, 128, -1] = 64
    """Weights in a row that share a scale; smaller is better quality and a larger file. -1 is the whole row."""
    sym: bool = True
    """Fix the zero point in the middle of the codes. False stores one per group: slightly better, but vLLM's GPU
    kernels don't load it."""
    ignore: tuple[str, ...] = ()
    """Linears to leave dense: ends of names (`mlp.down_proj`) or patterns (`*.layers.0.*`)."""
    act_order: bool = True
    """Round the groups with the largest activations first, and in each the columns (`act_group_aware`); with whole
    rows as groups the order is that of the columns."""
    mse: float = Field(default=0.0, ge=0, le=8)
    """Search the scale with the least error per group, errors raised to this power: 2.4 is usual. 0 spans the
    extremes."""
    damp: float = Field(default=0.05, gt=0, lt=1)
    """Added to the Hessian's diagonal before it is inverted, as a fraction of the diagonal's mean."""


def grid_of(options: Options) -> ours.Options:
    """Return our options of the same grid."""
    return ours.Options(
        bits=options.bits, group_size=options.group_size, sym=options.sym, ignore=options.ignore, damp=options.damp
    )


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be packed."""
    yield from ours.check(grid_of(options), facts, target)
    odd = {name: shape for name, shape in chosen(grid_of(options), facts).items() if any(n % PACKED for n in shape)}
    if odd:
        name, (rows, columns) = next(iter(odd.items()))
        message = (
            f"GPTQModel packs {PACKED} rows and columns at a time, which doesn't divide {rows}x{columns} of {name}"
        )
        yield Problem(code="packing-divides-shape", message=message, fix="use backend optikit", loc=("backend",))


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model."""
    return ours.after(grid_of(options), facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from the shapes: two forward passes, Hessians, and rounding column by column."""
    operations = 8.0 * facts.linear_elements * calibration_tokens
    written = after(options, facts).weight_bytes
    return Estimate(
        seconds=40 + operations / 2e11 + facts.linear_elements / 2e6,
        peak_bytes=1_000_000_000 + 2 * facts.weight_bytes + 4 * calibration_tokens * facts.hidden,
        disk_bytes=directory_bytes(written, facts.vocab),
        scratch_bytes=2 * written,
    )


def run(options: Options, job: Job) -> Facts:
    """Let GPTQModel quantize and save, take over what it packed, and hold it to the promise of any GPTQ stage."""
    from optikit.algorithms.grid import Grid
    from optikit.calibration.method import Walked
    from optikit.calibration.source_model import SourceModel
    from optikit.calibration.write_checkpoint import grid_layout
    from optikit.formats import gptq
    from optikit.formats.checkpoint import Checkpoint
    from optikit.models.reader import read

    stored = SourceModel(Checkpoint(job.source))
    names = [
        linear.name for block in range(stored.layers) for group in stored.groups(block, _nothing) for linear in group
    ]
    linears = tuple(name for name in names if not ignored(name, options.ignore))
    config = quantization_config(grid_of(options), read(job.source), damp_percent=options.damp)
    directory = _quantized(options, job, config)
    made = Checkpoint(directory)
    packed = {f"{name}.{suffix}" for name in linears for suffix in gptq.SUFFIXES}
    missing = sorted(packed - set(made))
    if missing:
        raise StageFailedError(f"GPTQModel wrote no {missing[0]}", fix="use backend optikit")
    untouched = {n: entry for n, entry in stored.checkpoint.entries.items() if n.removesuffix(".weight") not in linears}
    entries = {**untouched, **{name: made.entries[name] for name in packed}}
    grid = Grid(bits=options.bits, group_size=options.group_size, sym=options.sym)
    layout = grid_layout("gptq", grid, config)
    facts = layout.write(job, Walked(entries=entries, linears=linears, ignore=_nothing))
    return {**facts, "reader_mismatches": _reader_mismatches(directory, made, linears, options.bits)}


def _nothing(name: str) -> bool:
    """Leave no linear dense."""
    return False


def _quantized(options: Options, job: Job, config: dict[str, Any]) -> Path:
    """Return the directory that GPTQModel saved."""
    import os

    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # or it compiles C++ for packing, which torch does in seconds
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, job.threads))  # its default on two cores, 1, it refuses itself
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    from optikit.calibration.calibration_set import draw

    wanted = job.calibrated()
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    windows = draw(job.source, wanted.text, samples=wanted.samples, length=wanted.length, seed=job.seed).tolist()
    asked = QuantizeConfig(
        bits=options.bits,
        group_size=options.group_size,
        sym=options.sym,
        desc_act=False,
        act_group_aware=options.act_order and options.group_size > 0,
        damp_percent=options.damp,
        mse=options.mse,
        dynamic=config["dynamic"] or None,
        offload_to_disk=False,
        device=job.device,
    )
    model = GPTQModel.load(str(job.source), asked, dtype="auto")
    job.progress(0, 1, "quantize")
    whole = [1] * wanted.length
    model.quantize([{"input_ids": window, "attention_mask": whole} for window in windows], calibration_sort=None)
    made = job.scratch / "made"
    model.save(str(made))
    return made


def _reader_mismatches(directory: Path, made: Checkpoint, linears: tuple[str, ...], bits: int) -> int:
    """Return how many weights the library's own reader reads otherwise than we do, in any bit of float16."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    from optikit.formats import gptq

    theirs = GPTQModel.load(str(directory), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    differing = 0
    for name in linears:
        module = theirs.model.get_submodule(name)
        read = type(module).dequantize_weight(module).T  # the module's own attribute is compiled by torch first
        tensors = {suffix: made.read(f"{name}.{suffix}") for suffix in gptq.SUFFIXES}
        weight = gptq.dequantize(*gptq.unpack(tensors, bits), tensors["g_idx"])
        differing += int((weight.to(read.dtype) != read).sum())
    return differing
