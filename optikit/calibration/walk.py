"""The walk: for each decoder block, see the inputs of its linears, change its weights, pass the new outputs on.

Peak memory is two blocks (as stored, and in the compute dtype), the statistic of one group and what paused passes hold
(bounded); the model is never in memory, neither read nor written. After each block the walk commits; see ledger.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor, nn

from optikit import host
from optikit.calibration import windows
from optikit.calibration.arithmetic import compute_dtype
from optikit.calibration.ledger import HiddenStates, Ledger
from optikit.calibration.method import Applied, BlindMethod, Feeder, Group, Method, S
from optikit.calibration.paused import Door, PausedForward, fit_doors
from optikit.calibration.skeleton import Call, Skeleton
from optikit.calibration.stored import Linear, StoredModel
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint, Entry
from optikit.stages.protocol import Calibration, Job

BATCH_TOKENS = 4096
"""Tokens that go through a block together: enough for full speed of matrix products."""
PAUSED_SHARE = 0.25
"""Share of the memory bound that paused passes may hold; batches beyond it run again for every group."""


@dataclass(frozen=True, kw_only=True)
class Walked:
    """A finished walk.

    Attributes:
        entries: Every tensor of the new checkpoint and where its bytes lie now: in the source, or in scratch.
        linears: Full names of the linears that were changed.
        all_linears: Full names of all linears of the blocks.
        facts: What the technique found out, by linear name, as JSON.
        dtype: What activations were computed in.
    """

    entries: dict[str, Entry]
    linears: tuple[str, ...]
    all_linears: tuple[str, ...]
    facts: dict[str, Any]
    dtype: str


def walk(job: Job, method: Method[S], *, leave: Callable[[str], bool]) -> Walked:
    """Take a technique through all blocks of `job.source`; what is new lies in `job.scratch` afterwards.

    Args:
        job: Source, scratch, calibration, seed, device, threads, memory bound, progress.
        method: The technique.
        leave: Whether a linear (full name) is left as it is.

    Raises:
        StageFailedError: Unknown architecture, damaged weights or activations, a linear that is never called, text
            that is too short.
    """
    if job.calibration is None:
        raise StageFailedError("this method needs calibration text", fix="add `calibration: {text: …}` to the recipe")
    torch.set_num_threads(job.threads)
    stored = StoredModel(Checkpoint(job.source))
    dtype = compute_dtype(job.device)
    shape = [job.calibration.samples, job.calibration.length]
    ledger = Ledger(job.scratch, {"method": repr(method), "dtype": str(dtype), "seed": job.seed, "windows": shape})
    with torch.no_grad():
        _Calibrated(job, job.calibration, stored, ledger, method, leave, dtype).go()
    return _walked(stored, ledger, dtype)


def walk_blind(job: Job, method: BlindMethod, *, leave: Callable[[str], bool]) -> Walked:
    """Take a technique that looks at no inputs through all blocks; see `walk`."""
    torch.set_num_threads(job.threads)
    stored = StoredModel(Checkpoint(job.source))
    ledger = Ledger(job.scratch, {"method": repr(method)})
    with torch.no_grad():
        for index in range(ledger.done, stored.layers):
            block = _Changed()
            for linears in stored.groups(index, leave):
                block.take(stored, linears, method.apply(_group(job, stored, linears)))
            ledger.commit(block.tensors, block.linears, block.facts, "")
            job.progress(index + 1, stored.layers, "block")
    return _walked(stored, ledger, torch.float32)


def _walked(stored: StoredModel, ledger: Ledger, dtype: torch.dtype) -> Walked:
    replaced = {f"{name}.weight" for name in ledger.linears}
    kept = {name: entry for name, entry in stored.checkpoint.entries.items() if name not in replaced}
    every = stored.row.names(stored.layers)
    return Walked(
        entries={**kept, **ledger.entries()},
        linears=tuple(ledger.linears),
        all_linears=tuple(stored.stored_linear(name) for name in every),
        facts=ledger.facts,
        dtype=str(dtype).removeprefix("torch."),
    )


def _group(job: Job, stored: StoredModel, linears: tuple[Linear, ...], feeder: Feeder | None = None) -> Group:
    weights = tuple(stored.weight(linear).to(job.device) for linear in linears)
    return Group(names=tuple(linear.name for linear in linears), weights=weights, feeder=feeder)


class _Changed:
    """What is new in one block."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.linears: list[str] = []
        self.facts: dict[str, Any] = {}

    def take(self, stored: StoredModel, linears: tuple[Linear, ...], applied: Applied) -> None:
        """Take a group in: its packed tensors, or its new weights where a technique packs nothing."""
        dense = {
            f"{linear.name}.weight": stored.as_stored(linear, weight)
            for linear, weight in zip(linears, applied.weights, strict=True)
        }
        self.tensors.update(applied.tensors or dense)
        self.linears += [linear.name for linear in linears]
        self.facts.update(applied.facts)


class _Passes:
    """All batches on their way through one block; the first `keep` wait at doors, the others run again for each."""

    def __init__(self, block: nn.Module, call: Call, hidden: HiddenStates, *, keep: int, device: str) -> None:
        self._block, self._call, self._hidden, self._keep, self._device = block, call, hidden, keep, device
        self._waiting: dict[int, PausedForward] = {}

    def _get(self, index: int) -> PausedForward:
        if index not in self._waiting:
            hidden = self._hidden.read(index).to(self._device)
            args, kwargs = self._call.args, self._call.kwargs
            self._waiting[index] = PausedForward(lambda: self._block(hidden, *args, **kwargs))
        return self._waiting[index]

    def inputs(self, door: Door) -> Iterator[Tensor]:
        """Yield the input of a linear, (tokens, in_features), batch by batch."""
        for index in range(self._hidden.batches):
            yield self._get(index).advance(door).flatten(0, 1)
            if index >= self._keep:
                self._waiting.pop(index).abandon()

    def outputs(self) -> Iterator[Tensor]:
        """Yield the block's output, (windows, tokens, width) on the CPU, batch by batch."""
        for index in range(self._hidden.batches):
            yield self._get(index).finish().cpu()
            del self._waiting[index]

    def close(self) -> None:
        """Unwind whatever still waits."""
        for forward in self._waiting.values():
            forward.abandon()
        self._waiting.clear()


class _Calibrated(Generic[S]):
    """The walk with calibration text."""

    def __init__(
        self,
        job: Job,
        calibration: Calibration,
        stored: StoredModel,
        ledger: Ledger,
        method: Method[S],
        leave: Callable[[str], bool],
        dtype: torch.dtype,
    ) -> None:
        self._job, self._calibration, self._stored, self._ledger = job, calibration, stored, ledger
        self._method, self._leave = method, leave
        self._skeleton = Skeleton(stored, dtype=dtype, device=job.device)
        self._calls: list[Call] = []
        self._shape = (0, 0, 0)
        self._batch = 1

    def go(self) -> None:
        """Walk the blocks that are not done yet."""
        layers = self._stored.layers
        if self._ledger.done == layers:
            return
        self._begin()
        for index in range(self._ledger.done, layers):
            self._block(index)
            self._job.progress(index + 1, layers, "block")
        self._hidden(layers).path.unlink()

    def _hidden(self, index: int) -> HiddenStates:
        return HiddenStates(self._ledger.hidden_path(index), self._shape, self._skeleton.dtype, self._batch)

    def _begin(self) -> None:
        calibration, length = self._calibration, self._calibration.length
        most = self._stored.most_tokens
        if length > most:
            raise StageFailedError(f"calibration.length {length} is beyond the model's {most} positions")
        tokens = windows.draw(
            self._stored.checkpoint.directory,
            calibration.text,
            samples=calibration.samples,
            length=length,
            seed=self._job.seed,
        )
        self._batch = max(1, BATCH_TOKENS // length)
        with self._skeleton.stem_filled():
            self._calls = self._skeleton.record(tokens[:1])
            self._shape = (calibration.samples, length, self._skeleton.width)
            if not self._hidden(self._ledger.done).intact(self._ledger.hidden_sha256):
                self._ledger.forget()
                self._ledger.hidden_sha256 = self._hidden(0).write(self._skeleton.embedded(tokens, self._batch))

    def _kept(self, groups: list[tuple[Linear, ...]]) -> int:
        """Return how many batches may wait at doors within the memory bound."""
        widest = max((self._stored.width(linears[0]) for linears in groups), default=0)
        tokens = self._batch * self._shape[1]
        each = tokens * (4 * self._shape[2] + 2 * widest) * self._skeleton.dtype.itemsize
        bound = self._job.max_memory_bytes or host.memory_bytes()
        return int(bound * PAUSED_SHARE / each)

    def _block(self, index: int) -> None:
        groups = self._stored.groups(index, self._leave)
        before, after = self._hidden(index), self._hidden(index + 1)
        block = self._skeleton.fill_block(index)
        remove_doors = fit_doors(block, tuple(linears[0].inside for linears in groups))
        passes = _Passes(block, self._calls[index], before, keep=self._kept(groups), device=self._job.device)
        changed = _Changed()
        try:
            for linears in groups:
                feeder = self._stored.feeder(index, linears, self._leave, changed.tensors)
                applied = self._apply(passes, linears, feeder)
                self._skeleton.replace(block, linears, applied.weights)
                changed.take(self._stored, linears, applied)
            sha256 = after.write(passes.outputs())
        finally:
            passes.close()
            remove_doors()
            self._skeleton.empty_block(index)
        self._ledger.commit(changed.tensors, changed.linears, changed.facts, sha256)

    def _apply(self, passes: _Passes, linears: tuple[Linear, ...], feeder: Feeder | None) -> Applied:
        statistic = self._method.statistic(self._stored.width(linears[0]), self._job.device)
        for inputs in passes.inputs(linears[0].inside):
            if not torch.isfinite(inputs).all():
                message = f"the inputs of {linears[0].name} are not finite"
                raise StageFailedError(message, fix="does the dense model give finite outputs on this text?")
            statistic.update(inputs)
        return self._method.apply(_group(self._job, self._stored, linears, feeder), statistic)
