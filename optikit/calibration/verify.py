"""Re-open what was written and hold it to what was promised: by reading files, not by trusting the code that wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optikit.algorithms.grid import Grid, pruned_mask
from optikit.calibration import aims
from optikit.calibration.expert_proof import ExpertProof, Found, entropy
from optikit.calibration.source_model import SourceModel
from optikit.errors import StageFailedError
from optikit.formats import gptq
from optikit.formats.checkpoint import Checkpoint, Entry, read_entry, same_bytes

FIX = "this is a defect of optikit or of the disk: run again, and report it if it stays"
LARGEST_ERROR = 1.0
"""Error of a weight relative to its norm at which it isn't the same weight any more; 4-bit rounding is near 0.1."""


def verify_packed(
    source: Path, dest: Path, linears: tuple[str, ...], grid: Grid, aimed: Mapping[str, Entry]
) -> dict[str, Any]:
    """Check a `gptq` checkpoint against the dense one it was made from.

    Every promised linear is packed in the promised grid, finite, close to the dense weight, or to what a corrected one
    was aimed at (see aims.py), zero where a pruned one was zero; every other tensor has the bytes of the source.

    Returns:
        Facts: linears packed, bits per packed weight, share of the blocks' linear weights that is packed; and what was
        found of experts.

    Raises:
        StageFailedError: Naming the tensor that isn't what was promised.
    """
    model, written = SourceModel(Checkpoint(source)), Checkpoint(dest)
    _check_names(model, written, set(linears))
    weights = packed_bytes = 0
    proof = ExpertProof()
    for name in linears:
        weights += math.prod(model.checkpoint.entries[f"{name}.weight"].shape)
        proof.add(_check_linear(model, written, name, grid, aimed.get(name)))
        entries = [written.entries[f"{name}.{suffix}"] for suffix in gptq.SUFFIXES]
        packed_bytes += sum(entry.stop - entry.start for entry in entries)
    every = {linear.name for block in range(model.layers) for group in model.groups(block, _none) for linear in group}
    total = sum(_elements(model.checkpoint.entries[f"{name}.weight"]) for name in every)
    return {
        "linears_packed": len(linears),
        "bits_per_weight": round(8 * packed_bytes / max(weights, 1), 3),
        "packed_share": round(weights / max(total, 1), 4),
        **proof.facts(),
    }


def _check_names(model: SourceModel, written: Checkpoint, packed: set[str]) -> None:
    """Check that the promised tensors are there, and no others; those that aren't packed have their old bytes."""
    expected = {f"{name}.{suffix}" for name in packed for suffix in gptq.SUFFIXES}
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


def _check_linear(model: SourceModel, written: Checkpoint, name: str, grid: Grid, aim: Entry | None) -> Found:
    tensors = {suffix: written.read(f"{name}.{suffix}") for suffix in gptq.SUFFIXES}
    dense = model.read(f"{name}.weight").float()
    dense = dense.T if model.row.transposed else dense
    codes, scales, zeros = gptq.unpack(tensors, grid.bits)
    _check_grid(name, dense, codes, scales, zeros, grid)
    new = gptq.dequantize(codes, scales, zeros, tensors["g_idx"])
    if not torch.isfinite(new).all():
        raise StageFailedError(f"{name} dequantizes to NaN or infinity", fix=FIX)
    pruned = pruned_mask(dense)
    if pruned is not None and bool((new[~pruned] != 0).any()):
        raise StageFailedError(f"{name} was pruned and has lost zeros", fix=FIX)
    found, wanted = (new, dense) if aim is None else (aims.seen(new), read_entry(aim))
    error = ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
    if error >= LARGEST_ERROR:
        raise StageFailedError(f"{name} is off by {error:.0%} of its norm", fix=FIX)
    used = entropy(codes)
    if used == 0 and bool((wanted != wanted.reshape(-1)[0]).any()):
        raise StageFailedError(f"all codes of {name} are {int(codes.reshape(-1)[0])}", fix=FIX)
    sizes = scales.abs()
    return Found(name, error, used, (float(sizes.min()), float(sizes.max())))


def _check_grid(name: str, dense: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> None:
    rows, columns = dense.shape
    size = grid.width(columns)
    if codes.shape != dense.shape or scales.shape != (rows, columns // size) or zeros.shape != scales.shape:
        message = (
            f"{name} has codes {tuple(codes.shape)} and scales {tuple(scales.shape)} for a weight {rows}x{columns}"
        )
        raise StageFailedError(message, fix=FIX)
    middle = 2 ** (grid.bits - 1)
    if scales.dtype != torch.float16 or bool((scales == 0).any()):
        raise StageFailedError(f"{name} has scales that are zero or not float16", fix=FIX)
    if bool((zeros == 0).any()) or (grid.sym and bool((zeros != middle).any())):
        raise StageFailedError(f"{name} has zero points that its grid doesn't allow", fix=FIX)
