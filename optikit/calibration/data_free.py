"""The walk without calibration text: linears are read, changed and committed by strips of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from optikit.calibration.method import DataFreeMethod
from optikit.calibration.resume import ResumeState
from optikit.calibration.source_model import Linear, Linears, SourceModel
from optikit.process.allocator import one_arena, return_memory
from optikit.stage import Job

COMMIT_BYTES = 1 << 28
"""Of dense weights that are changed between two commits."""


def walk(
    job: Job, source: SourceModel, method: DataFreeMethod, state: ResumeState, ignore: Callable[[str], bool]
) -> None:
    """Change linears that aren't done yet.

    What is committed together is a block, or of a large one as many linears as fit into `COMMIT_BYTES`.
    """
    one_arena(bounded=job.max_memory_bytes is not None)
    units = [unit for block in range(source.layers) for unit in _units(source, block, ignore)]
    for index, linears in enumerate(units[state.done :], state.done):
        # Handed on at once: a name for them would keep them in memory while the next are made.
        state.commit(_changed(job, source, method, linears), [linear.name for linear in linears], {}, "")
        return_memory()  # strips leave holes between what they become
        job.progress(index + 1, len(units), "block" if len(units) == source.layers else "part of a block")


def _changed(job: Job, source: SourceModel, method: DataFreeMethod, linears: Linears) -> dict[str, Tensor]:
    """Return the new tensors of linears by full name."""
    tensors: dict[str, Tensor] = {}
    for linear in linears:

        def read(linear: Linear = linear) -> Iterator[Tensor]:
            return (weight.to(job.device) for _, weight in source.strips(linear))

        dtype = source.checkpoint.entries[f"{linear.name}.weight"].torch_dtype
        packing = method.layout.packing_for(dtype, transposed=source.row.transposed)
        packed = packing.joined(method.strips(read, linear.name), source.rows(linear))
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
