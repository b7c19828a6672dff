"""Layouts: how changed linears lie in a model directory, how it is written, and how it is held to what was promised.

Every layout opens the files again: what was promised to change did, and all other tensors have the source's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from optikit.algorithms.grid import Grid, pruned_mask
from optikit.algorithms.sparsity import Pattern, holds
from optikit.calibration import aims
from optikit.calibration.expert_proof import ExpertProof, Found
from optikit.calibration.method import PreviousOp, Walked
from optikit.calibration.source_model import JointScale, Linear, SourceModel
from optikit.calibration.verify import FIX, LARGEST_ERROR, verify_rounded
from optikit.errors import StageFailedError
from optikit.fileio import write_json
from optikit.formats.checkpoint import Checkpoint, read_entry, same_bytes
from optikit.formats.directory import write_model
from optikit.formats.packing import IntegerPacking, Packing, dense, integers, off_grid
from optikit.stage import Facts, Job

LARGEST_BEHIND_NORM = 0.4
"""Error of a linear relative to its norm, both scaled as the norm before it says, above which more than rounding
happened: 4 bits are near 0.1. SmolLM2-135M with its scales applied twice, as AutoAWQ does on a CPU, is up to 0.65 off.
Scales between two linears can only be estimated, so there `LARGEST_ERROR` has to do."""


@dataclass(frozen=True, kw_only=True)
class ScaledLayout:
    """Packed linears whose inputs may be scaled: scales are folded into the op before them.

    Norms and biases before scaled linears may change, and only they; what they were divided by is read off the files,
    and with it every linear is compared with the dense one it stands for, or with what a corrected one was aimed at.

    Attributes:
        dtypes: Tensors of a packed linear by suffix, with their dtypes.
        unpack: Returns the weight (out, in) float32 that they stand for.
        config: `quantization_config` of config.json.
    """

    dtypes: Mapping[str, torch.dtype]
    unpack: Callable[[Mapping[str, Tensor]], Tensor]
    config: Mapping[str, Any]

    def write(self, job: Job, walked: Walked) -> Facts:
        """Write `job.dest` and verify it against `job.source`.

        Returns:
            Facts: linears packed, bits per packed weight, relative error of weights.

        Raises:
            StageFailedError: Naming the tensor that isn't what was promised.
        """
        write_model(job.source, job.dest, walked.entries, changes={"quantization_config": dict(self.config)})
        source, written = SourceModel(Checkpoint(job.source)), Checkpoint(job.dest)
        _check_names(source, written, self, walked)
        errors: dict[str, float] = {}
        for block in range(source.layers):
            errors |= _check_block(block, source, written, self, walked)
        packed = [written.entries[f"{name}.{suffix}"] for name in walked.linears for suffix in self.dtypes]
        elements = sum(math.prod(source.checkpoint.entries[f"{name}.weight"].shape) for name in walked.linears)
        return {
            "linears_packed": len(errors),
            "bits_per_weight": round(8 * sum(entry.stop - entry.start for entry in packed) / elements, 3),
            "relative_weight_error_mean": round(sum(errors.values()) / len(errors), 5),
            **_experts(errors),
        }


def _experts(errors: Mapping[str, float]) -> Facts:
    proof = ExpertProof()
    for name, error in errors.items():
        proof.add(Found(name, error))
    return proof.facts()


def _check_names(source: SourceModel, written: Checkpoint, layout: ScaledLayout, walked: Walked) -> None:
    """Check that the promised tensors are there, and that tensors no scale can be folded into have their old bytes."""
    promised = {f"{name}.{suffix}" for name in walked.linears for suffix in layout.dtypes}
    dense = {name for name in source.checkpoint if name.removesuffix(".weight") not in walked.linears}
    if promised | dense != set(written):
        odd = min((promised | dense) ^ set(written))
        raise StageFailedError(f"{odd} is {'missing' if odd not in written else 'unasked for'}", fix=FIX)
    for name in sorted(dense - _scaled_names(source, walked.ignore)):
        if not same_bytes(source.checkpoint.entries[name], written.entries[name]):
            raise StageFailedError(f"{name} should be untouched and differs from the source", fix=FIX)


def _scaled_names(source: SourceModel, ignore: Callable[[str], bool]) -> set[str]:
    """Return the names of the tensors that a scale can be folded into."""
    found = {
        name
        for block in range(source.layers)
        for group in source.groups(block, ignore)
        if group[0].expert is None and (previous := source.previous_op(block, group, ignore, {}))
        for name in (f"{previous.name}.weight", f"{previous.name}.bias")
    }
    joint = [read for block in range(source.layers) if (read := source.joint(block, ignore)) is not None]
    for read in joint:
        found |= {f"{read.previous.name}.weight", f"{read.previous.name}.bias", *read.readers}
    return found


def _check_block(
    block: int, source: SourceModel, written: Checkpoint, layout: ScaledLayout, walked: Walked
) -> dict[str, float]:
    """Return the relative error of every packed linear of a block against what it was aimed at, scaled as that was.

    Scaled, because that is what was rounded: undone, the rounding of channels that were made small would count most.
    """
    errors, divided = {}, dict[str, Tensor]()
    joint = source.joint(block, walked.ignore)
    if joint is not None:
        _check_readers(joint, source, written)
    for group in source.groups(block, walked.ignore):
        shared = joint.previous if joint is not None and group[0] in joint.linears else None
        previous = shared or source.previous_op(block, group, walked.ignore, {})
        columns = _scale(previous, written, divided)
        most = LARGEST_BEHIND_NORM if previous is not None and not previous.linear else LARGEST_ERROR
        for linear in group:
            new, dense = _unpacked(linear, written, layout), source.weight(linear)
            _check_weight(linear.name, new, dense)
            seen, wanted = _comparable(linear.name, new, dense, columns, walked)
            if source.absorbs(linear):
                rows = _rows(seen, wanted)
                divided[linear.name] = 1 / rows
                wanted = wanted * rows[:, None]
            error = float((seen - wanted).norm() / wanted.norm().clamp_min(1e-30))
            if not error < most:
                raise StageFailedError(f"{linear.name} is off by {error:.0%} of its norm", fix=FIX)
            errors[linear.name] = error
    return errors


def _check_weight(name: str, new: Tensor, dense: Tensor) -> None:
    """Check that a weight has its shape, and its zeros where it was pruned."""
    if new.shape != dense.shape:
        raise StageFailedError(f"{name} has shape {tuple(new.shape)}, not {tuple(dense.shape)}", fix=FIX)
    alive = pruned_mask(dense)
    if alive is not None and bool((new[~alive] != 0).any()):
        raise StageFailedError(f"{name} was pruned and has lost zeros", fix=FIX)


def _check_readers(joint: JointScale, source: SourceModel, written: Checkpoint) -> None:
    """Check that what chooses experts was multiplied by what the norm before it was divided by."""
    columns = _scale(joint.previous, written, {})
    for name in joint.readers:
        weight = source.read(name)
        if not torch.equal((weight.float() * columns).to(weight.dtype), written.read(name)):
            raise StageFailedError(f"{name} isn't scaled as {joint.previous.name} is", fix=FIX)


def _comparable(name: str, new: Tensor, dense: Tensor, columns: Tensor, walked: Walked) -> tuple[Tensor, Tensor]:
    """Return a weight as written and as wanted, both in full or both as aims are kept; (out, n) each.

    Args:
        name: Full name of the linear.
        new: (out, in), to be read with inputs that are divided by `columns`.
        dense: (out, in), as the source has it: what is wanted where nothing was corrected.
        columns: (in,) or (1,).
        walked: Has the aim, where the linear was corrected, and the scale that its inputs should be divided by.
    """
    if name not in walked.aims:
        return new, dense * columns
    scale = read_entry(walked.aims[f"{name}{aims.SCALE}"])
    return aims.seen(new * (scale / columns)), read_entry(walked.aims[name])


def _rows(new: Tensor, dense: Tensor) -> Tensor:
    """Return the factor of each row, (out,), by least squares."""
    rows = (new * dense).sum(dim=1) / dense.square().sum(dim=1)
    return torch.where(torch.isfinite(rows) & (rows > 0), rows, 1.0)


def _unpacked(linear: Linear, written: Checkpoint, layout: ScaledLayout) -> Tensor:
    tensors = {suffix: written.read(f"{linear.name}.{suffix}") for suffix in layout.dtypes}
    for suffix, dtype in layout.dtypes.items():
        if tensors[suffix].dtype != dtype:
            raise StageFailedError(f"{linear.name}.{suffix} is {tensors[suffix].dtype}, not {dtype}", fix=FIX)
    return layout.unpack(tensors)


def _scale(previous: PreviousOp | None, written: Checkpoint, divided: Mapping[str, Tensor]) -> Tensor:
    """Return the scale that the written files divide a group's inputs by, (in,) or (1,)."""
    if previous is None:
        return torch.ones(1)
    if previous.linear:
        per_row = divided[previous.name]
        return per_row if previous.ties is None else per_row[previous.ties]
    name = f"{previous.name}.weight"
    before, after = previous.tensors[name].float() + previous.offset, written.read(name).float() + previous.offset
    return torch.where(after == 0, 1.0, before / after)


@dataclass(frozen=True, kw_only=True)
class NarrowedLayout:
    """Linears with fewer rows or columns, dense as before.

    Attributes:
        shapes: Promised (out_features, in_features) of every linear, by full name.
        figures: Entries of config.json that change.
    """

    shapes: Mapping[str, tuple[int, int]]
    figures: Mapping[str, int]

    def write(self, job: Job, walked: Walked) -> Facts:
        """Write `job.dest` and verify it against `job.source`.

        Returns:
            Facts: share of importance that was kept (mean, least).

        Raises:
            StageFailedError: Naming the tensor that isn't what was promised.
        """
        write_model(job.source, job.dest, walked.entries, changes=self.figures)
        source, written = SourceModel(Checkpoint(job.source)), Checkpoint(job.dest)
        if set(source.checkpoint) != set(written):
            odd = min(set(source.checkpoint) ^ set(written))
            raise StageFailedError(f"{odd} is in only one of source and result", fix=FIX)
        linears = {source.linear_name(name): shape for name, shape in self.shapes.items()}
        for name, (rows, columns) in linears.items():
            weight = written.read(f"{name}.weight")
            if tuple(weight.shape) != ((columns, rows) if source.row.transposed else (rows, columns)):
                raise StageFailedError(f"{name} has shape {tuple(weight.shape)}, not ({rows}, {columns})", fix=FIX)
            if not torch.isfinite(weight).all():
                raise StageFailedError(f"{name} became NaN or infinite", fix="set compensate: false")
        for name, entry in source.checkpoint.entries.items():
            layer = name.rpartition(".")[0]
            if layer not in linears and not same_bytes(entry, written.entries[name]):
                raise StageFailedError(f"{name} should be untouched and differs from the source", fix=FIX)
        shares = [row["kept_importance"] for row in walked.rows.values()]
        return {"kept_importance_mean": round(sum(shares) / len(shares), 4), "kept_importance_least": min(shares)}


def write_shortened(job: Job, removed: tuple[int, ...]) -> dict[str, Any]:
    """Write `job.dest` without some blocks, the others under new numbers, and check it against `job.source`.

    Raises:
        StageFailedError: Naming the tensor that isn't what was promised.
    """
    source = SourceModel(Checkpoint(job.source))
    kept = [index for index in range(source.layers) if index not in removed]
    renamed = _renamed(source, kept)
    entries = {new: source.checkpoint.entries[old] for new, old in renamed.items()}
    write_model(job.source, job.dest, entries, changes=_changes(job, source, kept))
    written = Checkpoint(job.dest)
    if set(written) != set(renamed):
        raise StageFailedError(f"{min(set(written) ^ set(renamed))} is missing or unasked for", fix=FIX)
    for new, old in renamed.items():
        if not same_bytes(source.checkpoint.entries[old], written.entries[new]):
            raise StageFailedError(f"{new} differs from the source's {old}", fix=FIX)
    return {"blocks_kept": kept, "blocks_removed": list(removed)}


def _renamed(source: SourceModel, kept: list[int]) -> dict[str, str]:
    """Return every tensor of the shortened model with its name in the source."""
    first = source.linear_name(f"{source.row.block(0)}.{source.row.linears[0]}")
    prefix = first.removesuffix(f"0.{source.row.linears[0]}")  # `model.layers.`, or `layers.` in a bare checkpoint
    names = {}
    for old in source.checkpoint:
        if not old.startswith(prefix):
            names[old] = old
            continue
        index, _, rest = old.removeprefix(prefix).partition(".")
        if int(index) in kept:
            names[f"{prefix}{kept.index(int(index))}.{rest}"] = old
    return names


def _changes(job: Job, source: SourceModel, kept: list[int]) -> dict[str, Any]:
    """Return what changes in config.json; kinds of attention that go by a block's number are written out."""
    changes: dict[str, Any] = {source.row.keys["layers"]: len(kept)}
    kinds = getattr(AutoConfig.from_pretrained(job.source, trust_remote_code=False), "layer_types", None)
    if kinds and (len(set(kinds)) > 1 or "layer_types" in source.checkpoint.config()):
        changes["layer_types"] = [kinds[index] for index in kept]
    return changes


@dataclass(frozen=True, kw_only=True)
class RoundedLayout:
    """Linears that were rounded where they stand; every other tensor as it was.

    Attributes:
        packing: Of the linears.
        config: `quantization_config` of config.json.
        beside: Files to write beside it, as JSON by name.
    """

    packing: Packing
    config: Mapping[str, Any]
    beside: Mapping[str, Any] = field(default_factory=dict)

    def packing_for(self, dtype: torch.dtype, *, transposed: bool) -> Packing:  # noqa: ARG002 - all linears alike
        """Return the packing."""
        return self.packing

    def write(self, job: Job, walked: Walked) -> Facts:
        """Write `job.dest` and verify it against `job.source`; facts and errors are those of `verify_rounded`."""
        write_model(job.source, job.dest, walked.entries, changes={"quantization_config": dict(self.config)})
        for name, content in self.beside.items():
            write_json(job.dest / name, content)
        return verify_rounded(job.source, job.dest, self.packing, walked)


@dataclass(frozen=True, kw_only=True)
class GridLayout(RoundedLayout):
    """The same of integer codes on a grid."""

    packing: IntegerPacking
    grid: Grid


def grid_layout(form: str, grid: Grid, config: Mapping[str, Any]) -> GridLayout:
    """Return the layout of codes on a grid, in the packing that a `format` names."""
    packing = integers(form, grid.bits, sym=grid.sym)
    return GridLayout(packing=replace(packing, wrong=partial(off_grid, packing, grid)), config=config, grid=grid)


@dataclass(frozen=True)
class SparseLayout:
    """Linears with zeros, dense as before; every other tensor as it was.

    Attributes:
        pattern: How many zeros every linear has, and where they may lie.
    """

    pattern: Pattern

    def packing_for(self, dtype: torch.dtype, *, transposed: bool) -> Packing:
        """Return how the source has weights."""
        return dense(dtype, transposed=transposed)

    def write(self, job: Job, walked: Walked) -> Facts:
        """Write `job.dest` and verify it against `job.source`.

        Returns:
            Facts: linears pruned, their sparsity (least, mean), and how many weights became zero.

        Raises:
            StageFailedError: Naming the tensor that isn't what was promised.
        """
        source = SourceModel(Checkpoint(job.source))
        write_model(job.source, job.dest, source.stacked(walked.entries), changes={})
        written = SourceModel(Checkpoint(job.dest))
        _check_others(source.checkpoint, written.checkpoint, {f"{name}.weight" for name in walked.linears})
        shares, zeros = [], 0
        for name in sorted(walked.linears):
            here, elements = _zeros(Linear("", name), written, self.pattern)
            shares.append(here / elements)
            zeros += here
        return {
            "linears_pruned": len(shares),
            "sparsity_mean": round(sum(shares) / len(shares), 4),
            "sparsity_least": round(min(shares), 4),
            "zeros": zeros,
        }


def _check_others(source: Checkpoint, written: Checkpoint, pruned: set[str]) -> None:
    """Check that there are the same tensors, of the same kinds; those that were not pruned have their bytes."""
    if set(source) != set(written):
        odd = min(set(source) ^ set(written))
        raise StageFailedError(f"{odd} is in only one of source and result", fix=FIX)
    for name, entry in source.entries.items():
        new = written.entries[name]
        if name not in pruned and not same_bytes(entry, new):
            raise StageFailedError(f"{name} should be untouched and differs from the source", fix=FIX)
        if (new.shape, new.dtype) != (entry.shape, entry.dtype):
            raise StageFailedError(f"{name} changed its shape or dtype", fix=FIX)


def _zeros(linear: Linear, written: SourceModel, pattern: Pattern) -> tuple[int, int]:
    """Return how many weights of a pruned linear are zero, and how many there are, read a strip at a time.

    Raises:
        StageFailedError: Zeros are missing that the pattern asks for.
        IntegrityError: It holds NaN or infinity.
    """
    zeros = elements = rows = 0
    for _, weight in written.strips(linear):
        if pattern.group and not holds(weight, pattern):
            raise StageFailedError(f"{linear.name} lacks zeros that were promised", fix=FIX)
        zeros += int((weight == 0).sum())
        elements += weight.numel()
        rows += len(weight)
    if not pattern.group and zeros < pattern.sparsity * elements - rows:
        raise StageFailedError(f"{linear.name} lacks zeros that were promised", fix=FIX)
    return zeros, elements
