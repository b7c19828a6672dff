"""AWQ by AutoAWQ 0.2.9: the authors' line of code, archived in 2025, with transformers 4.51.

Paper   Lin et al. 2023, arXiv:2306.00978
Helps   to compare with, or to get, exactly what AutoAWQ makes
Hurts   time: it runs every block again for each of twenty scales, where `backend: optikit` asks Gram matrices
Cost    forty forward passes per block and a search that is O(30·out·in·tokens); the whole model in memory
Differs windows are ours, not pile-val; all linears of the blocks are quantized; on a CPU its search gets the
        copy of the weights that it means to restore (`_mended`)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optikit.models import architectures
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, Estimate, Facts, Job, StageOptions, calibrated, no_objection
from optikit.stages.quantize import awq as ours
from optikit.stages.quantize._grid import quantization_config
from optikit.targets import Target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SUMMARY = "AWQ by AutoAWQ 0.2.9, in an environment of its own"
NEEDS = DENSE
WRITES = "model"
USES_TARGET = False
LIBRARIES = ("autoawq", "torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT: str | None = "autoawq"
inputs = calibrated
fits = no_objection

CLIPPED_ROWS = 64
"""Outputs that AutoAWQ's search for clipping takes at once (awq/quantize/quantizer.py, _compute_best_clip)."""


class Options(StageOptions):
    """Options of `quantize: {method: awq, backend: autoawq}`."""

    bits: Literal[4] = 4
    """Bits per weight; the format knows no other."""
    group_size: Literal[32, 64, 128] = 64
    """Weights in a row that share a scale; smaller is better quality and a larger file."""
    clip: bool = True
    """Search the range of every group with the least error, instead of spanning its extremes."""
    duo_scaling: bool = True
    """Look at weights as well as activations when channels are scaled."""
    parallel_samples: int = Field(default=16, ge=1, le=65536)
    """Windows that go through a block at once: more is faster and takes more memory."""


def grid_of(options: Options) -> ours.Options:
    """Return our options of the same grid."""
    return ours.Options(group_size=options.group_size)


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be packed, or what AutoAWQ has no class for."""
    known = architectures.known_to("autoawq")
    if facts.model_type not in known:
        message = f"AutoAWQ 0.2.9 doesn't know model_type {facts.model_type!r} (of those here: {', '.join(known)})"
        yield Problem(code="unknown-architecture", message=message, fix="use backend optikit", loc=("backend",))
    odd = [name for name, (rows, _) in facts.linears.items() if rows % CLIPPED_ROWS]
    if options.clip and odd:
        rows = facts.linears[odd[0]][0]
        message = (
            f"AutoAWQ searches clipping {CLIPPED_ROWS} outputs at a time, which does not divide {rows} of {odd[0]}"
        )
        yield Problem(code="clip-divides-outputs", message=message, fix="set clip: false", loc=("clip",))
    yield from ours.check(grid_of(options), facts, target)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model."""
    return ours.after(grid_of(options), facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from the shapes: forward passes for every scale tried, and a search that multiplies out every group."""
    passes = 2.0 * 45 * facts.linear_elements * calibration_tokens
    search = 40.0 * facts.linear_elements * min(512, calibration_tokens) if options.clip else 0.0
    written = after(options, facts).weight_bytes
    return Estimate(
        seconds=30 + passes / 2.2e11 + search / 3e9,
        peak_bytes=600_000_000 + 2 * facts.weight_bytes + 60 * calibration_tokens * facts.hidden,
        disk_bytes=3 * written,
    )


def run(options: Options, job: Job) -> Facts:
    """Let AutoAWQ quantize, take its tensors byte by byte, and hold them to the promise of any AWQ stage."""
    from optikit.calibration.method import Walked
    from optikit.calibration.source_model import SourceModel
    from optikit.calibration.write_checkpoint import ScaledLayout
    from optikit.formats.checkpoint import Checkpoint
    from optikit.formats.packing import AWQ_GEMM
    from optikit.models.reader import read

    made = Checkpoint(_quantized(options, job))
    stored = SourceModel(Checkpoint(job.source))
    groups = [stored.groups(block, _nothing) for block in range(stored.layers)]
    linears = tuple(linear.name for block in groups for group in block for linear in group)
    entries = {name: entry for name, entry in made.entries.items() if name in stored.checkpoint or _packed(name)}
    layout = ScaledLayout(
        dtypes=AWQ_GEMM.dtypes,
        unpack=AWQ_GEMM.dequantize,
        config=quantization_config(grid_of(options), read(job.source)),
    )
    facts = layout.write(job, Walked(entries=entries, linears=linears, ignore=_nothing))
    written = Checkpoint(job.dest)
    return {**facts, "reader_mismatches": sum(_differing(written, name, options) for name in linears)}


def _nothing(name: str) -> bool:
    """Leave no linear dense."""
    return False


def _packed(name: str) -> bool:
    return name.endswith((".qweight", ".qzeros", ".scales"))


def _quantized(options: Options, job: Job) -> Path:
    """Return the directory that AutoAWQ saved."""
    import torch
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

    from optikit.calibration.calibration_set import draw
    from optikit.formats.dialects import spoken

    wanted = job.calibrated()
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    windows = draw(job.source, wanted.text, samples=wanted.samples, length=wanted.length, seed=job.seed)
    source = spoken(job.source, job.scratch / "source", "4.51")
    model = AutoAWQForCausalLM.from_pretrained(str(source), trust_remote_code=False, local_files_only=True)
    config = {"zero_point": True, "q_group_size": options.group_size, "w_bit": 4, "version": "GEMM"}
    model.quantize(
        tokenizer=None,
        quant_config=config,
        calib_data=windows.tolist(),
        max_calib_samples=wanted.samples,
        max_calib_seq_len=wanted.length,
        apply_clip=options.clip,
        duo_scaling=options.duo_scaling,
        n_parallel_calib_samples=options.parallel_samples,
        quantizer_cls=_mended(AwqQuantizer, job.progress),
    )
    made = job.scratch / "made"
    model.save_quantized(str(made))
    return made


def _mended(base: Any, progress: Callable[[int, int, str], None]) -> Any:
    """Return AutoAWQ's quantizer, right on a CPU, and telling after every block how far it is.

    Its search keeps `{k: v.cpu() for k, v in module.state_dict().items()}` to restore the weights after each trial. On
    a GPU that is a copy; on a CPU it is the weights themselves, which the first trial scales: every linear behind a
    norm is then scaled twice and the norm once (awq/quantize/quantizer.py, _compute_best_scale; SmolLM2-135M came out
    with 8000 times its perplexity).
    """

    class Mended(base):  # type: ignore[misc]  # known only in the environment that has AutoAWQ
        done = 0

        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module: Any, *others: Any, **more: Any) -> Any:
            alias = module.state_dict
            module.state_dict = lambda: {name: tensor.clone() for name, tensor in alias().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module, *others, **more)
            finally:
                del module.state_dict  # the class's own is seen again

        def _apply_quant(self, module: Any, named_linears: Any) -> None:
            super()._apply_quant(module, named_linears)
            self.done += 1
            progress(self.done, len(self.modules), "blocks")

    return Mended


def _differing(written: Any, name: str, options: Options) -> int:
    """Count the weights of a linear that AutoAWQ reads otherwise than the next stage will."""
    from awq.utils.packing_utils import dequantize_gemm

    from optikit.formats import awq, gptq
    from optikit.models import traits

    tensors = {suffix: written.read(f"{name}.{suffix}") for suffix in traits.rows()["int4_awq"].suffixes}
    theirs = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, options.group_size)
    mine = gptq.dequantize(*awq.unpack(tensors))
    return int((mine.half() != theirs.T).sum())
