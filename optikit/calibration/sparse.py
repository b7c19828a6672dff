"""The end of a pruning that writes zeros: the model directory, written and held to its promise."""

from __future__ import annotations

from typing import Any

import torch

from optikit.algorithms.sparsity import Pattern, holds
from optikit.calibration.stored import StoredModel
from optikit.calibration.verify import FIX, same_bytes
from optikit.calibration.walk import Walked
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint
from optikit.formats.directory import write_model
from optikit.stages.protocol import Job


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
