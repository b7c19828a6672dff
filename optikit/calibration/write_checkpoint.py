"""The end of a quantization that scales: the model directory, written and held to its promise.

Norms and biases that feed scaled linears are allowed to change, and only they; what they were divided by is read off
the files, and with it every linear is compared with the dense one it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from optikit.algorithms.grid import Grid, pruned_mask
from optikit.algorithms.sparsity import Pattern, holds
from optikit.calibration.blockwise import Walked
from optikit.calibration.method import Feeder
from optikit.calibration.source_model import Linear, StoredModel
from optikit.calibration.verify import FIX, LARGEST_ERROR, same_bytes, verify_packed
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint
from optikit.formats.directory import write_model
from optikit.stage import Job

LARGEST_BEHIND_NORM = 0.4
"""Error of a linear relative to its norm, both scaled as the norm before it says, above which more than rounding
happened: 4 bits are near 0.1. SmolLM2-135M with its scales applied twice, as AutoAWQ does on a CPU, is up to 0.65 off.
Scales between two linears can only be estimated, so there `LARGEST_ERROR` has to do."""


@dataclass(frozen=True)
class Packing:
    """How linears are packed: tensors by suffix with their dtypes, and the weight (out, in) float32 they stand for."""

    dtypes: Mapping[str, torch.dtype]
    unpack: Callable[[Mapping[str, Tensor]], Tensor]


def write_scaled(
    job: Job, walked: Walked, packing: Packing, quantization_config: Mapping[str, Any], leave: Callable[[str], bool]
) -> dict[str, Any]:
    """Write `job.dest` with packed linears and folded scales, and verify it against `job.source`.

    Returns:
        Facts about what was written.

    Raises:
        StageFailedError: Naming the tensor that isn't what was promised.
    """
    write_model(job.source, job.dest, walked.entries, changes={"quantization_config": dict(quantization_config)})
    stored, written = StoredModel(Checkpoint(job.source)), Checkpoint(job.dest)
    _check_names(stored, written, walked.linears, packing, leave)
    errors: dict[str, float] = {}
    for block in range(stored.layers):
        errors |= _check_block(block, stored, written, packing, leave)
    packed = [written.entries[f"{name}.{suffix}"] for name in walked.linears for suffix in packing.dtypes]
    elements = sum(math.prod(stored.checkpoint.entries[f"{name}.weight"].shape) for name in walked.linears)
    return {
        "linears_packed": len(errors),
        "bits_per_weight": round(8 * sum(entry.stop - entry.start for entry in packed) / elements, 3),
        "relative_weight_error_mean": round(sum(errors.values()) / len(errors), 5),
    }


def _check_names(
    stored: StoredModel, written: Checkpoint, linears: tuple[str, ...], packing: Packing, leave: Callable[[str], bool]
) -> None:
    """Check that the promised tensors are there, and that whatever feeds no scaled linear has the source's bytes."""
    promised = {f"{name}.{suffix}" for name in linears for suffix in packing.dtypes}
    dense = {name for name in stored.checkpoint if name.removesuffix(".weight") not in linears}
    if promised | dense != set(written):
        odd = min((promised | dense) ^ set(written))
        raise StageFailedError(f"{odd} is {'missing' if odd not in written else 'unasked for'}", fix=FIX)
    may_change = {
        name
        for block in range(stored.layers)
        for group in stored.groups(block, leave)
        if (feeder := stored.feeder(block, group, leave, {}))
        for name in (f"{feeder.name}.weight", f"{feeder.name}.bias")
    }
    for name in sorted(dense - may_change):
        if not same_bytes(stored.checkpoint.entries[name], written.entries[name]):
            raise StageFailedError(f"{name} should be untouched and differs from the source", fix=FIX)


def _check_block(
    block: int, stored: StoredModel, written: Checkpoint, packing: Packing, leave: Callable[[str], bool]
) -> dict[str, float]:
    """Return the relative error of every packed linear of a block against the dense one, scaled as the files have it.

    Scaled, because that is what was rounded: undone, the rounding of channels that were made small would count most.
    """
    errors, divided = {}, dict[str, Tensor]()
    feeders = {feeder for feeder in stored.row.feeders if feeder in stored.row.linears}
    for group in stored.groups(block, leave):
        feeder = stored.feeder(block, group, leave, {})
        columns = _scale(feeder, written, divided)
        most = LARGEST_BEHIND_NORM if feeder is not None and not feeder.linear else LARGEST_ERROR
        for linear in group:
            scale = columns
            new, dense = _unpacked(linear, written, packing), stored.weight(linear)
            if new.shape != dense.shape:
                raise StageFailedError(f"{linear.name} has shape {tuple(new.shape)}, not {tuple(dense.shape)}", fix=FIX)
            alive = pruned_mask(dense)
            if alive is not None and bool((new[~alive] != 0).any()):
                raise StageFailedError(f"{linear.name} was pruned and has lost zeros", fix=FIX)
            if linear.inside in feeders:
                rows = _rows(new / scale, dense)
                divided[linear.name] = 1 / rows
                scale = scale * rows[:, None]
            wanted = dense * scale
            error = float((new - wanted).norm() / wanted.norm().clamp_min(1e-30))
            if not error < most:
                raise StageFailedError(f"{linear.name} is off by {error:.0%} of its norm", fix=FIX)
            errors[linear.name] = error
    return errors


def _rows(new: Tensor, dense: Tensor) -> Tensor:
    """Return what each row (out,) was multiplied by, as far as one can tell."""
    rows = (new * dense).sum(dim=1) / dense.square().sum(dim=1)
    return torch.where(torch.isfinite(rows) & (rows > 0), rows, 1.0)


def _unpacked(linear: Linear, written: Checkpoint, packing: Packing) -> Tensor:
    tensors = {suffix: written.read(f"{linear.name}.{suffix}") for suffix in packing.dtypes}
    for suffix, dtype in packing.dtypes.items():
        if tensors[suffix].dtype != dtype:
            raise StageFailedError(f"{linear.name}.{suffix} is {tensors[suffix].dtype}, not {dtype}", fix=FIX)
    return packing.unpack(tensors)


def _scale(feeder: Feeder | None, written: Checkpoint, divided: Mapping[str, Tensor]) -> Tensor:
    """Return what a group's inputs are divided by, as the files have it."""
    if feeder is None:
        return torch.ones(1)
    if feeder.linear:
        per_row = divided[feeder.name]
        return per_row if feeder.ties is None else per_row[feeder.ties]
    name = f"{feeder.name}.weight"
    before, after = feeder.tensors[name].float() + feeder.offset, written.read(name).float() + feeder.offset
    return torch.where(after == 0, 1.0, before / after)


def write_narrowed(
    job: Job, walked: Walked, shapes: Mapping[str, tuple[int, int]], figures: Mapping[str, int]
) -> dict[str, Any]:
    """Write `job.dest` with narrower linears and check it against `job.source`.

    Args:
        job: Source and destination.
        walked: The finished walk.
        shapes: Promised (out_features, in_features) of every linear, by full name.
        figures: Entries of config.json that change.

    Raises:
        StageFailedError: Naming the tensor that isn't what was promised.
    """
    write_model(job.source, job.dest, walked.entries, changes=figures)
    stored, written = StoredModel(Checkpoint(job.source)), Checkpoint(job.dest)
    if set(stored.checkpoint) != set(written):
        odd = min(set(stored.checkpoint) ^ set(written))
        raise StageFailedError(f"{odd} is in only one of source and result", fix=FIX)
    linears = {stored.stored_linear(name): shape for name, shape in shapes.items()}
    for name, (rows, columns) in linears.items():
        weight = written.read(f"{name}.weight")
        if tuple(weight.shape) != ((columns, rows) if stored.row.transposed else (rows, columns)):
            raise StageFailedError(f"{name} has shape {tuple(weight.shape)}, not ({rows}, {columns})", fix=FIX)
        if not torch.isfinite(weight).all():
            raise StageFailedError(f"{name} became NaN or infinite", fix="set compensate: false")
    for name, entry in stored.checkpoint.entries.items():
        layer = name.rpartition(".")[0]
        if layer not in linears and not same_bytes(entry, written.entries[name]):
            raise StageFailedError(f"{name} should be untouched and differs from the source", fix=FIX)
    shares = [row["kept_importance"] for row in walked.facts.values()]
    return {"kept_importance_mean": round(sum(shares) / len(shares), 4), "kept_importance_least": min(shares)}


def write_shortened(job: Job, removed: tuple[int, ...]) -> dict[str, Any]:
    """Write `job.dest` without some blocks, the others under new numbers, and check it against `job.source`.

    Raises:
        StageFailedError: Naming the tensor that isn't what was promised.
    """
    stored = StoredModel(Checkpoint(job.source))
    kept = [index for index in range(stored.layers) if index not in removed]
    renamed = _renamed(stored, kept)
    entries = {new: stored.checkpoint.entries[old] for new, old in renamed.items()}
    write_model(job.source, job.dest, entries, changes=_changes(job, stored, kept))
    written = Checkpoint(job.dest)
    if set(written) != set(renamed):
        raise StageFailedError(f"{min(set(written) ^ set(renamed))} is missing or unasked for", fix=FIX)
    for new, old in renamed.items():
        if not same_bytes(stored.checkpoint.entries[old], written.entries[new]):
            raise StageFailedError(f"{new} differs from the source's {old}", fix=FIX)
    return {"blocks_kept": kept, "blocks_removed": list(removed)}


def _renamed(stored: StoredModel, kept: list[int]) -> dict[str, str]:
    """Return every tensor of the shortened model with its name in the source."""
    first = stored.stored_linear(f"{stored.row.block(0)}.{stored.row.linears[0]}")
    prefix = first.removesuffix(f"0.{stored.row.linears[0]}")  # `model.layers.`, or `layers.` in a bare checkpoint
    names = {}
    for old in stored.checkpoint:
        if not old.startswith(prefix):
            names[old] = old
            continue
        index, _, rest = old.removeprefix(prefix).partition(".")
        if int(index) in kept:
            names[f"{prefix}{kept.index(int(index))}.{rest}"] = old
    return names


def _changes(job: Job, stored: StoredModel, kept: list[int]) -> dict[str, Any]:
    """Return what changes in config.json; kinds of attention that go by a block's number are written out."""
    changes: dict[str, Any] = {stored.row.keys["layers"]: len(kept)}
    kinds = getattr(AutoConfig.from_pretrained(job.source, trust_remote_code=False), "layer_types", None)
    if kinds and (len(set(kinds)) > 1 or "layer_types" in stored.checkpoint.config()):
        changes["layer_types"] = [kinds[index] for index in kept]
    return changes


def write_packed(job: Job, walked: Walked, grid: Grid, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
    """Write `job.dest` as a `gptq` checkpoint and verify it against `job.source`.

    Returns:
        Facts about what was written.

    Raises:
        StageFailedError: What was written isn't what was promised.
    """
    write_model(job.source, job.dest, walked.entries, changes={"quantization_config": dict(quantization_config)})
    return verify_packed(job.source, job.dest, walked.linears, grid)


def write_sparse(job: Job, walked: Walked, pattern: Pattern) -> dict[str, Any]:
    """Write `job.dest` with the pruned weights and check it against `job.source`.

    Every promised linear has the promised zeros and is finite; every other tensor has the bytes of the source.

    Returns:
        Facts: linears pruned, their sparsity (least, mean), and how many weights became zero.

    Raises:
        StageFailedError: Naming the tensor that isn't what was promised.
    """
    write_model(job.source, job.dest, walked.entries, changes={})
    stored, written = StoredModel(Checkpoint(job.source)), Checkpoint(job.dest)
    pruned = {f"{name}.weight" for name in walked.linears}
    if set(stored.checkpoint) != set(written):
        odd = min(set(stored.checkpoint) ^ set(written))
        raise StageFailedError(f"{odd} is in only one of source and result", fix=FIX)
    for name in sorted(set(written) - pruned):
        if not same_bytes(stored.checkpoint.entries[name], written.entries[name]):
            raise StageFailedError(f"{name} should be untouched and differs from the source", fix=FIX)
    shares, zeros = [], 0
    for name in sorted(pruned):
        weight, before = written.read(name), stored.read(name)
        if weight.shape != before.shape or weight.dtype != before.dtype:
            raise StageFailedError(f"{name} changed its shape or dtype", fix=FIX)
        if not torch.isfinite(weight).all():
            raise StageFailedError(f"{name} became NaN or infinite", fix="raise damp, or use wanda")
        if not holds(weight.T if stored.row.transposed else weight, pattern):
            raise StageFailedError(f"{name} lacks zeros that were promised", fix=FIX)
        shares.append(float((weight == 0).float().mean()))
        zeros += int((weight == 0).sum())
    return {
        "linears_pruned": len(shares),
        "sparsity_mean": round(sum(shares) / len(shares), 4),
        "sparsity_least": round(min(shares), 4),
        "zeros": zeros,
    }
