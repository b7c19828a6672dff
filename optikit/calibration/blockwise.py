"""The walk: for each decoder block, see the inputs of its linears, change its weights, pass the new outputs on.

Peak memory is two blocks (in the checkpoint's dtype and in the compute dtype), the statistic of one group and what
paused passes hold (bounded); the model is never in memory, neither read nor written. After each block the walk commits;
see resume.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from optikit import host
from optikit.algorithms.awq import SEARCH_ROWS
from optikit.algorithms.precision import compute_dtype
from optikit.calibration import calibration_set, data_free, distributed, expert_walk
from optikit.calibration.block_changes import Block, Blocks, Change, group_of
from optikit.calibration.budget import BATCH_TOKENS, PAUSED_MOST, PAUSED_SHARE, paused_bytes_per_token
from optikit.calibration.cache_ranges import SUFFIXES, CacheRanges
from optikit.calibration.empty_model import Call, EmptyModel
from optikit.calibration.expert_walk import Seen
from optikit.calibration.forward_passes import ForwardPasses
from optikit.calibration.gram import Gram, PairedGram
from optikit.calibration.method import (
    Batch,
    DataFreeMethod,
    Group,
    JointMethod,
    Method,
    PreviousOp,
    Result,
    Walked,
)
from optikit.calibration.paused_forward import CapturePoint, answered, capture_hooks
from optikit.calibration.resume import HiddenStates, ResumeState
from optikit.calibration.source_model import Linears, SourceModel
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint
from optikit.models import language_part
from optikit.process.allocator import one_arena, return_memory, settle
from optikit.stage import Facts, Job


class Outcome(NamedTuple):
    """The result of a walk, beside the files.

    Attributes:
        facts: Facts about the files written, and the dtype of activations where there were any.
        rows: Facts about each linear by its name.
    """

    facts: Facts
    rows: Mapping[str, Mapping[str, Any]]


def run(
    job: Job,
    method: Method[Any] | DataFreeMethod,
    *,
    identity: str,
    ignore: Callable[[str], bool],
    experts: Seen = "all",
    cache: CacheRanges | None = None,
) -> Outcome:
    """Take a method through all blocks of `job.source`, write `job.dest` and verify it.

    Args:
        job: Source, destination, scratch, calibration, seed, device, threads, memory bound, progress.
        method: The technique, with the layout of its results.
        identity: Names method and options: a walk killed under another identity isn't resumed.
        ignore: Whether a linear (full name) is left as it is.
        experts: Which tokens routed experts are calibrated on; see expert_walk.py.
        cache: Watches keys and values as the changed blocks make them; its scales are written too.

    Raises:
        StageFailedError: Unknown architecture, damaged weights or activations, a linear that is never called, text
            that is too short; or the files aren't what was promised.
    """
    torch.set_num_threads(job.threads)
    source = SourceModel(Checkpoint(job.source))
    facts: Facts = {}
    if isinstance(method, Method):
        walk = _Calibrated(job, source, method, identity, ignore, experts, cache)
        state = walk.state
        facts["compute_dtype"] = str(walk.dtype).removeprefix("torch.")
        with torch.no_grad(), closing(walk.blocks()) as blocks:
            for block, groups in blocks:
                for linears, apply in groups:
                    block.take(linears, apply())
                    del apply  # with its statistic, before the next one is made
    else:
        state = ResumeState(job.scratch, {"method": identity}, job.note)
        if source.row.generic:
            EmptyModel(source, dtype=torch.bfloat16, device="meta")  # holds the row to transformers' class
        data_free.walk(job, source, method, state, ignore)
    written = method.layout.write(job, _walked(source, state, ignore))
    if source.row.generic:
        facts |= {"walk": "no row: generic walk"}
    return Outcome(written | facts | _corrections(state.facts) | _beside(source, state.facts), state.facts)


def _beside(source: SourceModel, rows: Mapping[str, Mapping[str, Any]]) -> Facts:
    """Return what was carried along as it was, and which experts had too few tokens to be judged by."""
    found: Facts = {"carried": language_part.kinds(source.carried)} if source.carried else {}
    if any("too_few_tokens" in row for row in rows.values()):
        found["experts_with_too_few_tokens"] = [name for name, row in rows.items() if row.get("too_few_tokens")]
    return found


def _walked(source: SourceModel, state: ResumeState, ignore: Callable[[str], bool]) -> Walked:
    replaced = {f"{name}.weight" for name in state.linears}
    kept = {name: entry for name, entry in source.checkpoint.entries.items() if name not in replaced}
    entries = {**kept, **state.entries()}
    linears = tuple(state.linears)
    added = frozenset(name for name in state.entries() if name.endswith(SUFFIXES))
    return Walked(entries=entries, linears=linears, ignore=ignore, added=added, aims=state.aims(), rows=state.facts)


def _corrections(rows: Mapping[str, Mapping[str, Any]]) -> Facts:
    """Return how far linears were corrected, where a method corrects: the mean factor, and how many it is 0 for."""
    factors = [row["correction"] for row in rows.values() if "correction" in row]
    if not factors:
        return {}
    return {
        "correction_mean": round(sum(factors) / len(factors), 3),
        "linears_corrected": sum(each > 0 for each in factors),
        "linears_uncorrected": sum(each == 0 for each in factors),
    }


def _finite(hidden: Tensor) -> bool:
    # A sum takes a fifth of the time, and is infinite or no number where a part of it is; large parts could be as well.
    return bool(torch.isfinite(hidden.sum(dtype=torch.float32)) or torch.isfinite(hidden).all())


def _uncorrected(method: Method[Any]) -> Method[Any]:
    plain: Any = method  # a frozen dataclass, as all that correct are
    return method if method.correct_damp is None else cast("Method[Any]", replace(plain, correct_damp=None))


class _Calibrated:
    """A walk with calibration text; beside the dense model where the method corrects."""

    def __init__(
        self,
        job: Job,
        source: SourceModel,
        method: Method[Any],
        identity: str,
        ignore: Callable[[str], bool],
        experts: Seen,
        cache: CacheRanges | None,
    ) -> None:
        self._seen: Seen = experts
        self._experts: expert_walk.ExpertWalk | None = None
        self._cache = cache or CacheRanges(watch=False)
        self._job, self._source, self._method, self._ignore = job, source, method, ignore
        self._calibration = job.calibrated()
        self._paired = method.correct_damp is not None
        self.dtype = compute_dtype(job.device)
        one_arena(bounded=job.max_memory_bytes is not None)
        self.state = ResumeState(
            job.scratch,
            {
                "method": identity,
                "paired": self._paired,
                "dtype": str(self.dtype),
                "seed": job.seed,
                "windows": [self._calibration.samples, self._calibration.length],
                "ranks": distributed.count(),
            },
            job.note,
        )
        if not distributed.agreed(self.state.done):  # killed between two of their commits
            self.state.reset()
        self._model = EmptyModel(source, dtype=self.dtype, device=job.device)
        self._calls: list[Call] = []
        self._shape = (0, 0, 0)
        self._batch = 1
        self._held_out: list[tuple[bool, ...]] = []
        self._joint: dict[int, Tensor | None] = {}

    def blocks(self) -> Blocks:
        """Yield the blocks that are not done yet."""
        layers = self._source.layers
        if self.state.done == layers:
            return
        self._begin()
        settle()
        for index in range(self.state.done, layers):
            yield from self._block(index)
            return_memory()
            self._job.progress(index + 1, layers, "block")
        self.state.hidden_path(layers).unlink(missing_ok=True)
        self.state.dense_path(layers).unlink(missing_ok=True)

    def _states(self, path: Path, times: int = 1) -> HiddenStates:
        windows, length, width = self._shape
        return HiddenStates(path, (windows * times, length, width), self.dtype, self._batch * times)

    def _given(self) -> int:
        """Return how often experts are given a token: where a router scales, once for each that it chooses."""
        experts = self._source.row.experts
        return int(str(self._source.config[experts.chosen])) if experts and experts.scaled else 1

    def _begin(self) -> None:
        calibration, length = self._calibration, self._calibration.length
        positions = self._source.max_positions
        if length > positions:
            raise StageFailedError(f"calibration.length {length} is beyond the model's {positions} positions")
        tokens = calibration_set.draw(
            self._source.checkpoint.directory,
            calibration.text,
            samples=calibration.samples,
            length=length,
            seed=self._job.seed,
        )
        self._batch = 1 if self._source.row.alone else max(1, BATCH_TOKENS // length)
        with self._model.stem_filled():
            self._calls = self._model.record(tokens[:1])
            tokens = distributed.share(tokens)
            held_out = distributed.share(calibration_set.held_out(calibration.samples))
            self._held_out = [tuple(part.tolist()) for part in torch.split(held_out, self._batch)]
            self._shape = (len(tokens), length, self._model.width)
            intact = self._intact()
            if not (distributed.agreed(intact) and intact):
                if self.state.done:
                    self._job.note("the hidden states kept of an earlier run of this step are damaged: it begins again")
                self.state.reset()
                for path in self._paths(0):
                    self._states(path).write(self._model.embedded(tokens, self._batch))

    def _paths(self, index: int) -> list[Path]:
        paths = [self.state.hidden_path(index)]
        return [*paths, self.state.dense_path(index)] if self._paired else paths

    def _intact(self) -> bool:
        digests = (self.state.hidden_sha256, self.state.dense_sha256)
        found = zip(self._paths(self.state.done), digests, strict=False)
        return all(self._states(path).intact(digest) for path, digest in found)

    def _kept(self, groups: list[Linears]) -> int:
        """Return how many batches may wait at capture points within the memory bound."""
        widest = max((self._source.width(linears[0]) for linears in groups), default=0)
        each = self._batch * self._shape[1]
        each *= paused_bytes_per_token(self._shape[2], widest, self.dtype.itemsize)
        bound = self._job.max_memory_bytes
        most = bound * PAUSED_SHARE if bound else min(host.memory_bytes() * PAUSED_SHARE, PAUSED_MOST)
        return int(most / each / len(self._paths(0)))

    def _block(self, index: int) -> Blocks:
        """Yield a block with its groups; then compute its new outputs and commit it."""
        with ExitStack() as stack:
            stack.callback(self._model.empty_block, index)
            filled = self._model.fill_block(index, experts=False)
            seen = self._traced(index)
            groups = self._source.groups(index, self._ignore, seen)
            points = [linears[0].inside for linears in groups if linears[0].expert is None]
            experts = self._experts_module(index)
            residuals = {residual for linears in groups if (residual := self._residual(linears))}
            passes = []
            modules = [filled, copy.deepcopy(filled)] if self._paired else [filled]
            for module, path in zip(modules, self._paths(index), strict=True):
                stack.enter_context(capture_hooks(module, points, residuals))
                stack.enter_context(answered(module, experts))
                if experts and self._source.row.experts:
                    stack.enter_context(expert_walk.chosen(module, self._source.row.experts))
                call, hidden, keep = self._calls[index], self._states(path), self._kept(groups)
                each = ForwardPasses(module, call, hidden, keep=keep, device=self._job.device)
                passes.append(stack.enter_context(closing(each)))
            block = Block(self._source, partial(self._take, filled))
            stack.enter_context(self._cache.watching(filled))
            yield block, self._changes(index, filled, block, passes, seen)
            after = zip(passes, self._paths(index + 1), strict=True)
            digests = [self._states(path).write(each.outputs()) for each, path in after]
            block.tensors |= self._cache.scales(self._source.block_name(index), filled)
        self.state.commit(block.tensors, block.linears, block.facts, *digests)

    def _traced(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Return the groups of a filled block where no row tells them."""
        if not self._source.row.generic:
            return ()
        hidden = self._states(self._paths(index)[-1]).read(0)[:1]  # the dense model's
        return self._model.traced(index, hidden, self._calls[index])

    def _experts_module(self, index: int) -> list[CapturePoint]:
        routed = self._source.row.experts
        return [routed.module] if routed and self._source.is_sparse(index) else []

    def _changes(
        self,
        index: int,
        module: nn.Module,
        block: Block,
        passes: list[ForwardPasses],
        seen: tuple[tuple[str, ...], ...],
    ) -> Iterator[Change]:
        for linears in self._source.steps(index, self._ignore, seen):
            return_memory()  # what passes needed on their way lies between what they still hold
            if linears is None:
                yield from self._expert_changes(index, module, block, passes)
                continue
            group = group_of(self._job, self._source, linears, self._previous(index, block, linears))
            joint = partial(self._joint_scale, index, block) if self._is_shared(index, linears) else None
            yield linears, self._gathered(group, self._batches(passes, linears), block, joint)

    def _is_shared(self, index: int, linears: Linears) -> bool:
        """Return whether linears of a block read what its experts read."""
        experts = self._source.row.experts
        return experts is not None and self._source.is_sparse(index) and linears[0].inside in experts.shared

    def _joint_scale(self, index: int, block: Block, gram: Callable[[], Tensor]) -> Tensor | None:
        """Return what is divided out of the norm before a block's experts, found once; None where nothing is."""
        if index not in self._joint:
            self._joint = {index: self._found_scale(index, block, gram)}
        return self._joint[index]

    def _found_scale(self, index: int, block: Block, gram: Callable[[], Tensor]) -> Tensor | None:
        method = self._method
        read = self._source.joint(index, self._ignore) if isinstance(method, JointMethod) else None
        if read is None or not isinstance(method, JointMethod):
            return None
        sample = self._source.sample(read.linears, SEARCH_ROWS).to(self._job.device)
        found = method.joint(read.previous, sample, gram())
        if found is None:
            return None
        scale, tensors = found
        block.tensors |= tensors
        for name in read.readers:
            weight = self._source.read(name)
            block.tensors[name] = (weight.float() * scale.to(weight.device)).to(weight.dtype)
        return scale

    def _expert_changes(
        self, index: int, module: nn.Module, block: Block, passes: list[ForwardPasses]
    ) -> Iterator[Change]:
        (point,) = self._experts_module(index)
        paths = [expert_walk.hidden_path(self._job.scratch, which) for which in range(len(passes))]
        streams = [
            expert_walk.listen(each, point, self._states(path, self._given()), self._shape[1])
            for each, path in zip(passes, paths, strict=True)
        ]
        self._experts = expert_walk.ExpertWalk(
            source=self._source,
            block=index,
            module=module.get_submodule(point),
            method=_uncorrected(self._method),
            streams=streams,
            seen=self._seen,
            ignore=self._ignore,
            dtype=self.dtype,
            device=self._job.device,
            joint=partial(self._joint_scale, index, block),
        )
        yield from self._experts.changes(partial(self._previous, index, block), partial(self._finished, block))
        for each, stream, path in zip(passes, streams, paths, strict=True):
            each.answer(point, [outputs.to(self.dtype) for outputs in stream.outputs])
            path.unlink()
        self._experts = None

    def _finished(self, block: Block) -> None:
        """Put an expert's new tensors on disk."""
        if self._experts is not None:
            block.tell(self._experts.facts)
        block.put_aside(self.state)
        return_memory()

    def _take(self, module: nn.Module, linears: Linears, weights: tuple[Tensor, ...]) -> None:
        """Give new weights to what computes the block's outputs."""
        if linears[0].expert is None:
            self._model.replace(module, linears, weights)
        elif self._experts is not None:
            self._experts.take(linears, weights)

    def _previous(self, index: int, block: Block, linears: Linears) -> PreviousOp | None:
        return self._source.previous_op(index, linears, self._ignore, block.tensors)

    def _gathered(
        self,
        group: Group,
        batches: Iterator[Batch],
        block: Block,
        joint: Callable[[Callable[[], Tensor]], Tensor | None] | None,
    ) -> Callable[[], Result]:
        statistic = self._method.statistic(group)
        for batch in batches:
            statistic.update(batch)
        if distributed.count() > 1:
            statistic.merge()
        if isinstance(statistic, PairedGram):
            corrected = statistic.corrected()
            group = replace(group, corrected=corrected.weight)
            block.facts |= {
                name: {"correction": factor} for name, factor in zip(group.names, corrected.factors, strict=True)
            }
        if joint is not None and isinstance(statistic, Gram):
            group = replace(group, scale=joint(statistic.mean))
        return partial(self._method.apply, group, statistic)

    def _residual(self, linears: Linears) -> CapturePoint:
        # Without a dense model at its side there is no gap; and a residual stream is added to by one linear at a time.
        return self._source.residual_source(linears[0]) if self._paired and len(linears) == 1 else ""

    def _batches(self, passes: list[ForwardPasses], linears: Linears) -> Iterator[Batch]:
        point, residual = linears[0].inside, self._residual(linears)
        waiting = zip(*(each.inputs(point, residual) for each in passes), strict=True)
        for held_out, (now, *dense) in zip(self._held_out, waiting, strict=True):
            inputs, stream = now
            if not _finite(inputs):
                message = f"the inputs of {linears[0].name} are not finite"
                raise StageFailedError(message, fix="does the dense model give finite outputs on this text?")
            wanted, dense_stream = dense[0] if dense else (inputs, None)
            gap = None if stream is None or dense_stream is None else dense_stream.float() - stream.float()
            if gap is not None:
                gap /= self._source.residual_scale
            yield Batch(inputs=inputs, dense_inputs=wanted, residual_gap=gap, held_out=held_out)
