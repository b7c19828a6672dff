"""The walk: for each decoder block, see the inputs of its linears, change its weights, pass the new outputs on.

Peak memory is two blocks (as stored, and in the compute dtype), the statistic of one group and what paused passes hold
(bounded); the model is never in memory, neither read nor written. After each block the walk commits; see ledger.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optikit import host
from optikit.algorithms.precision import compute_dtype
from optikit.calibration import calibration_set, distributed
from optikit.calibration.budget import BATCH_TOKENS, PAUSED_MOST, PAUSED_SHARE, paused_bytes_per_token
from optikit.calibration.empty_model import Call, Skeleton
from optikit.calibration.method import Applied, BlindMethod, Feeder, Group, Method, P, PairedMethod, S, Seen
from optikit.calibration.paused_forward import Door, PausedForward, fit_doors
from optikit.calibration.resume import HiddenStates, Ledger
from optikit.calibration.source_model import Linear, StoredModel
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint, Entry
from optikit.process.allocator import one_arena, return_memory, settle
from optikit.stage import Calibration, Job

Learn = Callable[[Group, Iterator[Seen]], Applied]
"""Looks at every batch that a group sees, and changes the group."""


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

    def learn(group: Group, batches: Iterator[Seen]) -> Applied:
        statistic = method.statistic(group.width, job.device)
        for seen in batches:
            statistic.update(seen.inputs)
        if distributed.count() > 1:
            statistic.merge()
        return method.apply(group, statistic)

    return _walk(job, learn, leave, name=repr(method), paired=False)


def walk_paired(job: Job, method: PairedMethod[P], *, leave: Callable[[str], bool]) -> Walked:
    """Take a technique through all blocks that also looks at the dense model's activations; see `walk`.

    Twice the forward passes, and two copies of the block at hand.
    """

    def learn(group: Group, batches: Iterator[Seen]) -> Applied:
        statistic = method.statistic(group)
        for seen in batches:
            statistic.see(seen)
        if distributed.count() > 1:
            statistic.merge()
        return method.apply(group, statistic)

    return _walk(job, learn, leave, name=repr(method), paired=True)


def _walk(job: Job, learn: Learn, leave: Callable[[str], bool], *, name: str, paired: bool) -> Walked:
    calibration = job.calibrated()
    torch.set_num_threads(job.threads)
    one_arena(bounded=job.max_memory_bytes is not None)
    stored = StoredModel(Checkpoint(job.source))
    dtype = compute_dtype(job.device)
    shape = [calibration.samples, calibration.length]
    identity = {"method": name, "paired": paired, "dtype": str(dtype), "seed": job.seed, "windows": shape}
    ledger = Ledger(job.scratch, identity | {"ranks": distributed.count()})
    if not distributed.agreed(ledger.done):  # killed between two of their commits
        ledger.forget()
    with torch.no_grad():
        _Calibrated(job, calibration, stored, ledger, learn, leave, dtype, paired=paired).go()
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

    def inputs(self, door: Door, base: Door = "") -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield, by batch, the input of a linear, (tokens, in_features), and of a watched module passed before."""
        for index in range(self._hidden.batches):
            forward = self._get(index)
            inputs = forward.advance(door)
            yield _flat(inputs), _flat(forward.watched[base]) if base else None
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


def _finite(hidden: Tensor) -> bool:
    # A sum takes a fifth of the time, and is infinite or no number where a part of it is; large parts could be as well.
    return bool(torch.isfinite(hidden.sum(dtype=torch.float32)) or torch.isfinite(hidden).all())


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


class _Calibrated:
    """The walk with calibration text."""

    def __init__(
        self,
        job: Job,
        calibration: Calibration,
        stored: StoredModel,
        ledger: Ledger,
        learn: Learn,
        leave: Callable[[str], bool],
        dtype: torch.dtype,
        *,
        paired: bool,
    ) -> None:
        self._job, self._calibration, self._stored, self._ledger = job, calibration, stored, ledger
        self._learn, self._leave, self._paired = learn, leave, paired
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
        settle()
        for index in range(self._ledger.done, layers):
            self._block(index)
            return_memory()
            self._job.progress(index + 1, layers, "block")
        self._ledger.hidden_path(layers).unlink(missing_ok=True)
        self._ledger.dense_path(layers).unlink(missing_ok=True)

    def _states(self, path: Path) -> HiddenStates:
        return HiddenStates(path, self._shape, self._skeleton.dtype, self._batch)

    def _begin(self) -> None:
        calibration, length = self._calibration, self._calibration.length
        most = self._stored.most_tokens
        if length > most:
            raise StageFailedError(f"calibration.length {length} is beyond the model's {most} positions")
        tokens = calibration_set.draw(
            self._stored.checkpoint.directory,
            calibration.text,
            samples=calibration.samples,
            length=length,
            seed=self._job.seed,
        )
        self._batch = max(1, BATCH_TOKENS // length)
        with self._skeleton.stem_filled():
            self._calls = self._skeleton.record(tokens[:1])
            tokens = distributed.share(tokens)
            self._shape = (len(tokens), length, self._skeleton.width)
            intact = self._intact()
            if not (distributed.agreed(intact) and intact):
                self._ledger.forget()
                for path in self._paths(0):
                    self._states(path).write(self._skeleton.embedded(tokens, self._batch))

    def _paths(self, index: int) -> list[Path]:
        paths = [self._ledger.hidden_path(index)]
        return [*paths, self._ledger.dense_path(index)] if self._paired else paths

    def _intact(self) -> bool:
        digests = (self._ledger.hidden_sha256, self._ledger.dense_sha256)
        found = zip(self._paths(self._ledger.done), digests, strict=False)
        return all(self._states(path).intact(digest) for path, digest in found)

    def _kept(self, groups: list[tuple[Linear, ...]]) -> int:
        """Return how many batches may wait at doors within the memory bound."""
        widest = max((self._stored.width(linears[0]) for linears in groups), default=0)
        each = self._batch * self._shape[1]
        each *= paused_bytes_per_token(self._shape[2], widest, self._skeleton.dtype.itemsize)
        bound = self._job.max_memory_bytes
        most = bound * PAUSED_SHARE if bound else min(host.memory_bytes() * PAUSED_SHARE, PAUSED_MOST)
        return int(most / each / len(self._paths(0)))

    def _block(self, index: int) -> None:
        groups = self._stored.groups(index, self._leave)
        doors = [linears[0].inside for linears in groups]
        bases = {base for linears in groups if (base := self._base(linears))}
        changed = _Changed()
        block = self._skeleton.fill_block(index)
        blocks = [block, copy.deepcopy(block)] if self._paired else [block]
        undo = [fit_doors(each, doors, bases) for each in blocks]
        passes = [
            _Passes(each, self._calls[index], self._states(path), keep=self._kept(groups), device=self._job.device)
            for each, path in zip(blocks, self._paths(index), strict=True)
        ]
        try:
            for linears in groups:
                return_memory()  # what passes needed on their way lies between what they still hold
                feeder = self._stored.feeder(index, linears, self._leave, changed.tensors)
                group = _group(self._job, self._stored, linears, feeder)
                applied = self._learn(group, self._seen(passes, linears))
                self._skeleton.replace(block, linears, applied.weights)
                changed.take(self._stored, linears, applied)
            after = zip(passes, self._paths(index + 1), strict=True)
            digests = [self._states(path).write(each.outputs()) for each, path in after]
        finally:
            for each in passes:
                each.close()
            for remove in undo:
                remove()
            self._skeleton.empty_block(index)
        self._ledger.commit(changed.tensors, changed.linears, changed.facts, *digests)

    def _base(self, linears: tuple[Linear, ...]) -> Door:
        # Without a dense model at its side nothing is behind; and a stream is added to by one linear at a time.
        return self._stored.base(linears[0]) if self._paired and len(linears) == 1 else ""

    def _seen(self, passes: list[_Passes], linears: tuple[Linear, ...]) -> Iterator[Seen]:
        door, base = linears[0].inside, self._base(linears)
        for now, *dense in zip(*(each.inputs(door, base) for each in passes), strict=True):
            inputs, stream = now
            if not _finite(inputs):
                message = f"the inputs of {linears[0].name} are not finite"
                raise StageFailedError(message, fix="does the dense model give finite outputs on this text?")
            wanted, dense_stream = dense[0] if dense else (inputs, None)
            behind = None if stream is None or dense_stream is None else dense_stream.float() - stream.float()
            yield Seen(inputs=inputs, dense_inputs=wanted, behind=behind)
