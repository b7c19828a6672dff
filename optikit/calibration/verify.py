"""Re-open what was written and hold it to what was promised: by reading files, not by trusting the code that wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from optikit.algorithms.grid import PRUNED_SHARE
from optikit.calibration import aims
from optikit.calibration.expert_proof import ExpertProof, Found, Tally
from optikit.calibration.method import Walked
from optikit.calibration.source_model import Linear, SourceModel
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint, Entry, read_entry, same_bytes
from optikit.formats.packing import IntegerPacking, Packing
from optikit.stage import Facts

FIX = "this is a defect of optikit or of the disk: run again, and report it if it stays"
LARGEST_ERROR = 1.0
"""Error of a weight relative to its norm at which it isn't the same weight any more; 4-bit rounding is near 0.1."""


def verify_rounded(source: Path, dest: Path, packing: Packing, walked: Walked) -> Facts:
    """Check a directory of packed linears against the dense one that it was made from, a strip of outputs at a time.

    Every promised linear is packed as promised, finite, and close to the dense weight, or to what a corrected one was
    aimed at (see aims.py); as close as the packing's rounding promises, where it does; zero where a pruned one was
    zero. Every other tensor has the bytes of the source. A linear of any size goes through a bounded memory.

    Returns:
        Facts: linears packed, bits per packed weight, share of the blocks' linear weights that is packed, their
        relative error; and what was found of experts.

    Raises:
        StageFailedError: Naming the tensor that isn't what was promised.
    """
    model, written = SourceModel(Checkpoint(source)), Checkpoint(dest)
    _check_names(model, written, packing, walked)
    found = [_found(Linear("", name), model, written, packing, walked) for name in walked.linears]
    entries = [written.entries[f"{name}.{suffix}"] for name in walked.linears for suffix in packing.dtypes]
    weights = sum(_elements(model.checkpoint.entries[f"{name}.weight"]) for name in walked.linears)
    every = {linear.name for block in range(model.layers) for group in model.groups(block, _none) for linear in group}
    total = sum(_elements(model.checkpoint.entries[f"{name}.weight"]) for name in every)
    proof = ExpertProof()
    for each in found:
        proof.add(each)
    return {
        "linears_packed": len(found),
        "bits_per_weight": round(8 * sum(entry.stop - entry.start for entry in entries) / max(weights, 1), 3),
        "packed_share": round(weights / max(total, 1), 4),
        "relative_weight_error_mean": round(sum(each.error for each in found) / max(len(found), 1), 5),
        **proof.facts(),
    }


def _check_names(model: SourceModel, written: Checkpoint, packing: Packing, walked: Walked) -> None:
    """Check that the promised tensors are there, and no others; those that aren't packed have their old bytes."""
    packed = set(walked.linears)
    expected = {f"{name}.{suffix}" for name in packed for suffix in packing.dtypes} | walked.added
    untouched = {name for name in model.checkpoint if name.removesuffix(".weight") not in packed}
    for name in sorted(expected | untouched):
        if name not in written:
            raise StageFailedError(f"{name} was not written", fix=FIX)
    for name in sorted(set(written) - expected - untouched):
        raise StageFailedError(f"{name} was written and nothing asked for it", fix=FIX)
    for name in sorted(untouched):
        if not same_bytes(model.checkpoint.entries[name], written.entries[name]):
            raise StageFailedError(f"{name} should be untouched and differs from the source", fix=FIX)


def _elements(entry: Entry) -> int:
    return (entry.stop - entry.start) // entry.torch_dtype.itemsize


def _none(_: str) -> bool:
    return False


def _found(linear: Linear, model: SourceModel, written: Checkpoint, packing: Packing, walked: Walked) -> Found:
    """Return what is found of a written linear; its error is against the source, or against what it was aimed at."""
    tensors = _tensors(linear, written, packing)
    aim = walked.aims.get(linear.name)
    aimed = None if aim is None else read_entry(aim)
    lost = norm = 0.0
    zeros = revived = elements = 0
    tally = Tally()
    for start, dense in model.strips(linear):
        strip = packing.strip(tensors, start, start + len(dense))
        new = _unpacked(linear, packing, strip, dense)
        if isinstance(packing, IntegerPacking):
            codes, scales, _ = packing.unpack(strip)
            tally.add(codes, scales)
        zeros += int((dense == 0).sum())
        revived += int(((dense == 0) & (new != 0)).sum())
        elements += dense.numel()
        seen, wanted = (new, dense) if aimed is None else (aims.seen(new), aimed[start : start + len(dense)])
        lost += float((seen - wanted).square().sum(dtype=torch.float64))
        norm += float(wanted.square().sum(dtype=torch.float64))
    if revived and zeros >= PRUNED_SHARE * elements:
        raise StageFailedError(f"{linear.name} was pruned and has lost zeros", fix=FIX)
    error = _relative(linear, lost, norm)
    if tally.only is not None and _varies(linear, model):
        raise StageFailedError(f"all codes of {linear.name} are {tally.only}", fix=FIX)
    return Found(linear.name, error, tally.entropy, tally.scales)


def _tensors(linear: Linear, written: Checkpoint, packing: Packing) -> dict[str, Tensor]:
    """Read what a packed linear is made of."""
    tensors = {suffix: written.read(f"{linear.name}.{suffix}") for suffix in packing.dtypes}
    for suffix, dtype in packing.dtypes.items():
        if tensors[suffix].dtype != dtype:
            raise StageFailedError(f"{linear.name}.{suffix} is {tensors[suffix].dtype}, not {dtype}", fix=FIX)
    return tensors


def _relative(linear: Linear, lost: float, norm: float) -> float:
    """Return the root of what was lost over that of what was wanted, both sums of squares."""
    error = math.sqrt(lost / norm) if norm > 0 else math.sqrt(lost)
    if not error < LARGEST_ERROR:
        raise StageFailedError(f"{linear.name} is off by {error:.0%} of its norm", fix=FIX)
    return error


def _varies(linear: Linear, model: SourceModel) -> bool:
    """Return whether the weights of a linear of the source are more than one number."""
    seen = [each for _, dense in model.strips(linear) for each in (dense.amin(), dense.amax())]
    return bool(min(seen) != max(seen))


def _unpacked(linear: Linear, packing: Packing, strip: Mapping[str, Tensor], dense: Tensor) -> Tensor:
    """Return what a strip stands for, held to what the packing promises."""
    if packing.wrong is not None and (why := packing.wrong(strip, dense)):
        raise StageFailedError(f"{linear.name} {why}", fix=FIX)
    new = packing.dequantize(strip)
    if new.shape != dense.shape:
        raise StageFailedError(f"{linear.name} has shape {tuple(new.shape)}, not {tuple(dense.shape)}", fix=FIX)
    if not torch.isfinite(new).all():
        raise StageFailedError(f"{linear.name} dequantizes to NaN or infinity", fix=FIX)
    if packing.bound is not None and bool(((new - dense).abs() > packing.bound(dense, strip)).any()):
        raise StageFailedError(f"{linear.name} has weights that aren't rounded to their nearest code", fix=FIX)
    return new
