"""Width: remove the MLP channels and attention heads that matter least, the same number in every block.

Paper   Ma et al. 2023, arXiv:2305.11627 (LLM-Pruner): coupled groups, first-order importance
Helps   latency and memory on every target: the result is a smaller model of uniform widths that any loader accepts
Hurts   quality at once; plan to train afterwards
Cost    a forward and a backward pass for `taylor`; one walk over the blocks with O(in²) float32 memory per linear
Differs the linears that read the remaining channels are refitted to the old outputs by least squares (`compensate`);
        every block loses the same number, because a configuration has one width for all; `contribution` needs no
        gradients: it judges a group by the size of what it adds to the outputs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from optikit.models import architectures
from optikit.models.architectures import Architecture
from optikit.models.facts import DTYPE_BYTES, ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, StageOptions, no_objection, split_calibrated
from optikit.stages import _blockwise_cost
from optikit.stages._experts import refuse_experts, refuse_wrapped
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.calibration.methods.width import Coupling

SUMMARY = "width: remove MLP channels and attention heads, equally many in every block"
NEEDS = DENSE
WRITES, CHANGES = "model", "narrowed"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
ENVIRONMENT = MAIN
inputs = split_calibrated
fits = no_objection


class Options(StageOptions):
    """Options of `prune: {method: width}`."""

    mlp: float = Field(default=0.2, ge=0, lt=1)
    """Share of the MLP channels to remove."""
    heads: float = Field(default=0.0, ge=0, lt=1)
    """Share of the key-value heads to remove, each with the query heads that read it."""
    multiple: int = Field(default=64, ge=1)
    """The MLP stays a multiple of this many channels wide, so that kernels and quantization groups fit."""
    importance: Literal["taylor", "contribution"] = "taylor"
    """What decides: the first-order change of the loss, or the size of a group's contribution to the outputs."""
    compensate: bool = True
    """Refit the linears that read the remaining channels to the old outputs."""


@dataclass(frozen=True)
class Widths:
    """Widths of a block: MLP channels, key-value heads, query heads."""

    channels: int
    kv_heads: int
    heads: int


def widths_of(options: Options, facts: ModelFacts) -> Widths:
    """Return the widths that stay: at least one unit of each."""
    units = max(1, round(facts.intermediate * (1 - options.mlp) / options.multiple))
    kv_heads = max(1, round(facts.kv_heads * (1 - options.heads)))
    return Widths(
        channels=min(units * options.multiple, facts.intermediate),
        kv_heads=kv_heads,
        heads=kv_heads * (facts.heads // facts.kv_heads),
    )


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be narrowed."""
    architecture = facts.architecture
    if architecture is None:
        message = f"model_type {facts.model_type!r} is not one whose linear layers are known"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {', '.join(architectures.names())}")
        return
    yield from refuse_experts(facts, "its blocks aren't taken apart here")
    yield from refuse_wrapped(facts, "isn't taken apart here")
    if options.heads and not architecture.free_heads:
        message = f"{facts.model_type} divides the width of a head out of the hidden size, so no head can go"
        yield Problem(code="heads-fixed", message=message, fix="set heads to 0", loc=("heads",))
    if options.mlp and not architecture.keys["intermediate"]:
        message = f"config.json of {facts.model_type} doesn't tell the width of the MLP, so that no channel can go"
        yield Problem(code="channels-fixed", message=message, fix="set mlp to 0", loc=("mlp",))
    widths = widths_of(options, facts)
    if options.mlp and widths.channels == facts.intermediate:
        message = f"mlp {options.mlp} of {facts.intermediate} channels is less than {options.multiple}"
        yield Problem(code="nothing-to-prune", message=message, fix="lower multiple or raise mlp", loc=("mlp",))
    if options.heads and widths.kv_heads == facts.kv_heads:
        message = f"heads {options.heads} of {facts.kv_heads} key-value heads is less than one"
        fix = f"use {1 / facts.kv_heads:.2g} or more, or 0"
        yield Problem(code="nothing-to-prune", message=message, fix=fix, loc=("heads",))
    if not options.mlp and not options.heads:
        yield Problem(code="nothing-to-prune", message="mlp and heads are both 0", fix="set mlp", loc=("mlp",))


def narrowed(architecture: Architecture, facts: ModelFacts, widths: Widths) -> dict[str, tuple[int, int]]:
    """Return the shapes of the linears after pruning: full name → (out_features, in_features)."""
    inside, outside = architecture.groups[0], architecture.groups[1]
    wide, back = architecture.wide, architecture.groups[-1]
    shapes = dict(facts.linears)
    for name, (rows, columns) in facts.linears.items():
        short = name.removeprefix(f"{architecture.blocks}.").partition(".")[2]
        if short in wide:
            shapes[name] = (rows // facts.intermediate * widths.channels, columns)
        elif short in back:
            shapes[name] = (rows, widths.channels)
        elif short in inside:
            shapes[name] = (rows * widths.kv_heads // facts.kv_heads, columns)
        elif short in outside:
            shapes[name] = (rows, columns * widths.kv_heads // facts.kv_heads)
    return shapes


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the narrowed model."""
    architecture = facts.architecture
    if architecture is None:
        return facts
    widths = widths_of(options, facts)
    shapes = narrowed(architecture, facts, widths)
    gone = facts.linear_elements - sum(rows * columns for rows, columns in shapes.values())
    return replace(
        facts,
        intermediate=widths.channels,
        heads=widths.heads,
        kv_heads=widths.kv_heads,
        linears=shapes,
        weight_bytes=facts.weight_bytes - int(gone * DTYPE_BYTES[facts.dtype]),
        config={**facts.config, **figures(architecture, facts, widths)},
    ).having("narrowed")


def figures(architecture: Architecture, facts: ModelFacts, widths: Widths) -> dict[str, int]:
    """Return the entries of config.json that narrowing changes."""
    keys = architecture.keys
    changed = {keys["intermediate"]: widths.channels}
    if widths.kv_heads != facts.kv_heads:
        changed |= {
            keys["heads"]: widths.heads,
            keys["kv_heads"]: widths.kv_heads,
            keys["head_dim"]: facts.head_dim,  # no longer hidden size / heads, which loaders fall back on
        }
    return changed


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate forward passes, backward ones where gradients tell importance, and a refit by Gram matrices."""
    written = after(options, facts).weight_bytes
    passes = 2 if options.importance == "taylor" else 1
    return _blockwise_cost.estimate(
        facts,
        calibration_tokens,
        passes=passes,
        grams=1,
        seconds_per_weight=3e-7,
        written_bytes=written,
        held=_blockwise_cost.GRAM,
    )


def run(options: Options, job: Job) -> Facts:
    """Walk the blocks, narrowing each on the outputs of the narrowed ones before it."""
    from optikit.calibration import blockwise
    from optikit.calibration.methods.width import Narrow, taylor
    from optikit.calibration.source_model import SourceModel
    from optikit.calibration.write_checkpoint import NarrowedLayout
    from optikit.formats.checkpoint import Checkpoint
    from optikit.models.reader import read

    facts = read(job.source)
    source = SourceModel(Checkpoint(job.source))
    widths = widths_of(options, facts)
    coupled = couplings(source.row, facts, widths)
    method = Narrow(
        NarrowedLayout(shapes=narrowed(source.row, facts, widths), figures=figures(source.row, facts, widths)),
        couplings=coupled,
        compensate=options.compensate,
        taylor=taylor(job, job.calibrated(), coupled) if options.importance == "taylor" else None,
        source=source,
    )
    readers = tuple(coupling.reader for coupling in coupled)
    identity = f"width {options!r}"
    written, _ = blockwise.run(job, method, identity=identity, ignore=lambda name: not name.endswith(readers))
    return {**written, "channels": widths.channels, "kv_heads": widths.kv_heads}


def couplings(architecture: Architecture, facts: ModelFacts, widths: Widths) -> tuple[Coupling, ...]:
    """Return the coupled channels of a block that get fewer."""
    from optikit.calibration.methods.width import Coupling

    back = architecture.groups[-1]
    found = []
    if widths.channels < facts.intermediate:
        makers = tuple((name, 1) for name in architecture.wide)
        units, keep = facts.intermediate, widths.channels
        found.append(Coupling(reader=back[0], makers=makers, size=1, units=units, keep=keep))
    if widths.kv_heads < facts.kv_heads:
        (query, *keys_values), (out,) = architecture.groups[0], architecture.groups[1]
        shared = facts.heads // facts.kv_heads * facts.head_dim
        makers = ((query, shared), *((name, facts.head_dim) for name in keys_values))
        found.append(Coupling(reader=out, makers=makers, size=shared, units=facts.kv_heads, keep=widths.kv_heads))
    return tuple(found)
