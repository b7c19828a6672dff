"""Turn a packed model directory into float weights: every linear as the numbers that its codes stand for.

Paper   none; the formats are those of optikit/models/packings.toml and traits.toml, each with its source
Helps   starting a stack from the only copy of a model that can be had, in GPTQ, AWQ, compressed-tensors, FP8, FP4, …
Hurts   the weights keep the rounding of the directory: never call them the original ones
Cost    one pass over the weights; memory of the largest linear, a few times in float32
Differs scales of activations and of caches are left out: they mean nothing to float weights
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from optikit.models.facts import DTYPE_BYTES, ModelFacts, Trait
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, Estimate, Facts, Job, StageOptions, directory_bytes, no_objection, nothing
from optikit.targets import Target

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


SUMMARY = "dequantize a packed model directory to float weights"
NEEDS = ANY
WRITES = "source"
USES_TARGET = False
LIBRARIES = ("torch", "safetensors")
ENVIRONMENT = MAIN
inputs = nothing
fits = no_objection
PEAK_PER_WEIGHT = 20
"""Bytes of memory per weight of the largest tensor: codes, what they are gathered from, and the float32 result."""
WEIGHTS_PER_SECOND = 60e6


class Options(StageOptions):
    """There is nothing to choose."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield nothing: a packing that can't be read is refused when the headers are read."""
    yield from ()


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the model directory: dense, in the dtype that config.json gives weights."""
    from optikit.models import config

    dtype = config.dtype(facts.config)
    told = {key: value for key, value in facts.config.items() if key != "quantization_config"}
    return replace(
        facts,
        dtype=dtype,
        weight_bytes=int(DTYPE_BYTES[dtype] * facts.parameters),
        traits=frozenset[Trait]({"dense"}),
        packing="",
        left_dense=frozenset(),
        config=told,
    )


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from the count of weights and the largest tensor that is in memory."""
    written = after(options, facts).weight_bytes
    largest = max(facts.vocab * facts.hidden // 2, *(rows * columns for rows, columns in facts.linears.values()))
    return Estimate(
        seconds=4 + facts.parameters / WEIGHTS_PER_SECOND,
        peak_bytes=350_000_000 + PEAK_PER_WEIGHT * largest,
        disk_bytes=directory_bytes(written, facts.vocab),
    )


def run(options: Options, job: Job) -> Facts:
    """Read the directory `job.source`, write a model directory of float weights to `job.dest`.

    Returns:
        `packing`: the format in words; `linears`: how many were packed; `left_out`: tensors without a place, by ending.

    Raises:
        IntegrityError: A weight isn't finite, or tensors don't go together.
    """
    return write_floats(job.source, job)


def write_floats(
    source: Path, job: Job, *, changed: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor
) -> Facts:
    """Write the directory of float weights that `source` stands for to `job.dest`; return what `run` does.

    Args:
        source: A model directory, packed or not.
        job: Where to, and who is told of progress.
        changed: Makes of a tensor, by its name, what is written; it is brought to the dtype that it had. Packed experts
            that lie in one tensor stay as they are: they come one at a time.

    Raises:
        IntegrityError: A weight isn't finite, or tensors don't go together.
    """
    from optikit.formats import AsFloats
    from optikit.formats.checkpoint import DTYPES
    from optikit.formats.directory import write_config
    from optikit.formats.stream import ShardWriter
    from optikit.models import config, packed
    from optikit.models.reader import read

    facts, found = read(source), AsFloats(source)
    dtype = config.dtype(facts.config)
    promised = {name: found.facts(name, dtype) for name in found}
    writer = ShardWriter(job.dest, promised)
    for done, (name, wanted) in enumerate(promised.items()):
        job.progress(done, len(promised), name)
        kind = DTYPES[wanted.dtype]
        if found.comes_whole(name):
            writer.write(name, changed(name, found[name].to(kind)).to(kind))
        else:
            writer.write_pieces(name, (piece.to(kind) for piece in found.pieces(name)))
    words = {value: key for key, value in config.DTYPES.items()}
    write_config(source, job.dest, changes={"dtype": words[dtype]}, without=("quantization_config", "torch_dtype"))
    left_out = Counter(name.rpartition(".")[2] for name in found.left_out)
    return {
        "packing": packed.described(found.storage),
        "linears": len(found.packed),
        "left_out": dict(sorted(left_out.items())),
        "weight_bytes": writer.finish(),
    }
