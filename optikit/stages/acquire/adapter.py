"""Merge a LoRA adapter into its base: every weight that it changes plus its product, everything else as it is.

Paper   Hu et al. 2021, arXiv:2106.09685, section 4.1; rank-stabilized: Kalajdzievski 2023, arXiv:2312.03732
Helps   starting a stack from an adapter, without a second program to merge it
Hurts   an adapter that was trained on a quantized base fits the dequantized one only as well as that does
Cost    one pass over the base; memory of its largest weight, a few times in float32
Differs one rounding for each weight, of the sum in float32, as peft's merge without checks (an embedding's product is
        rounded before); biases, DoRA and the like are refused
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, PLANNED, Estimate, Facts, Input, Job, StageOptions, no_objection
from optikit.stages.acquire import dequantize
from optikit.targets import Target

if TYPE_CHECKING:
    from torch import Tensor

    from optikit.models.adapter import Adapter

SUMMARY = "merge a LoRA adapter into its base"
NEEDS = ANY
WRITES = "source"
USES_TARGET = False
LIBRARIES = ("torch", "safetensors")
ENVIRONMENT = MAIN
fits = no_objection


class Options(StageOptions):
    """There is nothing to choose."""


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare the base model that the adapter names."""
    return {"base": PLANNED}


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield nothing: an adapter that can't be merged is refused when its headers are read."""
    yield from ()


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the merged model: dense, in the dtype that the base's config.json gives weights."""
    return dequantize.after(dequantize.Options(), facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from the base's weights."""
    return dequantize.estimate(dequantize.Options(), facts, target, calibration_tokens)


def run(options: Options, job: Job) -> Facts:
    """Merge the adapter `job.source` into `job.inputs["base"]`, write the model directory to `job.dest`.

    Returns:
        `merged`: how many weights were added to; `replaced`: tensors that the adapter has whole; `rank`, `base`.

    Raises:
        IntegrityError: A weight isn't finite, or the adapter belongs to another base.
    """
    from optikit.models import adapter as adapters
    from optikit.models.reader import read

    base = job.inputs["base"]
    found, facts = adapters.read(job.source), read(base)
    adapters.require_fits(found, facts, job.source)
    told = dequantize.write_floats(base, job, changed=partial(_changed, found, facts, job.source / adapters.WEIGHTS))
    counts = {"merged": len(found.products), "replaced": len(found.replaced), "rank": found.rank, "base": found.base}
    return {**told, **counts}


def _changed(adapter: Adapter, base: ModelFacts, weights: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of the base as the adapter makes it, in float32 where it was added to."""
    from optikit.formats.checkpoint import locate, read_entry
    from optikit.models.adapter import is_turned

    if name not in adapter.replaced and name not in adapter.products:
        return tensor
    entries = locate(weights)
    if name in adapter.replaced:
        return read_entry(entries[adapter.replaced[name]])
    product = adapter.products[name]
    a, b = (read_entry(entries[each]) for each in (product.a, product.b))
    made = (b.float() @ a.float()) * product.scale  # equation 3
    made = made.to(tensor.dtype) if product.embedding else made  # as peft does, which rounds these twice
    return tensor.float() + (made.T if is_turned(name, product, base) else made)
