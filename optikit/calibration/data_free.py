"""The walk without calibration text: weights are read, changed and committed, by blocks or by strips of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import Tensor

from optikit.calibration.block_changes import Block, Blocks, Change, group_of
from optikit.calibration.method import DataFreeMethod, RowMethod
from optikit.calibration.resume import ResumeState
from optikit.calibration.source_model import DOWN, Linear, Linears, SourceModel
from optikit.stage import Job

COMMIT_BYTES = 1 << 28
"""Of dense weights that are rounded between two commits."""


def blocks(
    job: Job, source: SourceModel, method: DataFreeMethod, state: ResumeState, ignore: Callable[[str], bool]
) -> Blocks:
    """Yield the blocks that are not done yet, of a walk without calibration text."""
    for index in range(state.done, source.layers):
        block = Block(source, forward=None)
        yield block, _changes(job, source, method, state, block, source.groups(index, ignore))
        state.commit(block.tensors, block.linears, block.facts, "")
        job.progress(index + 1, source.layers, "block")


def _changes(
    job: Job, source: SourceModel, method: DataFreeMethod, state: ResumeState, block: Block, groups: Iterable[Linears]
) -> Iterator[Change]:
    for linears in groups:
        yield linears, partial(method.apply, group_of(job, source, linears))
        if linears[0].part == DOWN:
            block.put_aside(state)


def nothing() -> Blocks:
    """Yield no block."""
    yield from ()


def by_rows(
    job: Job, source: SourceModel, method: RowMethod, state: ResumeState, ignore: Callable[[str], bool]
) -> None:
    """Round linears that aren't done yet, strip by strip.

    What is committed together is a block, or of a large one as many linears as fit into `COMMIT_BYTES`.
    """
    units = [unit for block in range(source.layers) for unit in _units(source, block, ignore)]
    for index, linears in enumerate(units[state.done :], state.done):
        # Handed on at once: a name for them would keep them in memory while the next are made.
        state.commit(_rounded(job, source, method, linears), [linear.name for linear in linears], {}, "")
        job.progress(index + 1, len(units), "block" if len(units) == source.layers else "part of a block")


def _rounded(job: Job, source: SourceModel, method: RowMethod, linears: Linears) -> dict[str, Tensor]:
    """Return the packed tensors of linears by full name."""
    packing, tensors = method.layout.packing, dict[str, Tensor]()
    for linear in linears:
        strips = (method.rows(weight.to(job.device), linear.name) for _, weight in source.strips(linear))
        packed = packing.joined(strips, source.rows(linear))
        tensors |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in packed.items()}
    return tensors


def _units(source: SourceModel, block: int, ignore: Callable[[str], bool]) -> Iterator[Linears]:
    """Yield the linears of a block in runs whose dense weights take `COMMIT_BYTES` at most, or one that takes more."""
    unit: list[Linear] = []
    size = 0
    for linear in (each for group in source.groups(block, ignore) for each in group):
        entry = source.checkpoint.entries[f"{linear.name}.weight"]
        size += entry.stop - entry.start
        if unit and size > COMMIT_BYTES:
            yield tuple(unit)
            unit, size = [], entry.stop - entry.start
        unit.append(linear)
    if unit:
        yield tuple(unit)
