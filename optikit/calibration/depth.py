"""Depth pruning over a checkpoint: measure every block's influence in one pass, then leave blocks out by renaming.

Two files of hidden states and one block are all that is held; nothing is computed twice after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from optikit.algorithms import depth
from optikit.calibration import windows
from optikit.calibration.arithmetic import compute_dtype
from optikit.calibration.bounds import BATCH_TOKENS
from optikit.calibration.ledger import HiddenStates, Ledger
from optikit.calibration.memory import one_arena, return_memory
from optikit.calibration.skeleton import Call, Skeleton
from optikit.calibration.stored import StoredModel
from optikit.calibration.verify import FIX, same_bytes
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint
from optikit.formats.directory import write_model
from optikit.stages.protocol import Calibration, Job


def influences(job: Job, calibration: Calibration) -> list[float]:
    """Return the mean block influence of every block on the calibration text.

    Raises:
        StageFailedError: Unknown architecture, damaged weights, text that is too short.
    """
    torch.set_num_threads(job.threads)
    one_arena(bounded=job.max_memory_bytes is not None)
    stored = StoredModel(Checkpoint(job.source))
    dtype = compute_dtype(job.device)
    shape = (calibration.samples, calibration.length)
    ledger = Ledger(job.scratch, {"method": "depth", "dtype": str(dtype), "seed": job.seed, "windows": list(shape)})
    if ledger.done < stored.layers:
        with torch.no_grad():
            _measure(job, calibration, stored, ledger, dtype)
    tokens = calibration.samples * calibration.length
    return [float(ledger.facts[str(index)]) / tokens for index in range(stored.layers)]


def _measure(job: Job, calibration: Calibration, stored: StoredModel, ledger: Ledger, dtype: torch.dtype) -> None:
    skeleton = Skeleton(stored, dtype=dtype, device=job.device)
    samples, length = calibration.samples, calibration.length
    tokens = windows.draw(job.source, calibration.text, samples=samples, length=length, seed=job.seed)
    batch = max(1, BATCH_TOKENS // length)

    def hidden(index: int) -> HiddenStates:
        return HiddenStates(ledger.hidden_path(index), (samples, length, skeleton.width), dtype, batch)

    with skeleton.stem_filled():
        calls = skeleton.record(tokens[:1])
        if not hidden(ledger.done).intact(ledger.hidden_sha256):
            ledger.forget()
            hidden(0).write(skeleton.embedded(tokens, batch))
    for index in range(ledger.done, stored.layers):
        changes: list[float] = []
        block = skeleton.fill_block(index)
        digest = hidden(index + 1).write(_outputs(block, calls[index], hidden(index), job.device, changes))
        skeleton.empty_block(index)
        return_memory()
        ledger.commit({}, [], {str(index): sum(changes)}, digest)
        job.progress(index + 1, stored.layers, "block")
    hidden(stored.layers).path.unlink()


def _outputs(block: nn.Module, call: Call, hidden: HiddenStates, device: str, changes: list[float]) -> Iterator[Tensor]:
    for index in range(hidden.batches):
        before = hidden.read(index).to(device)
        output = block(before, *call.args, **call.kwargs)
        after = output[0] if isinstance(output, tuple) else output
        changes.append(depth.influence(before, after))
        yield after.cpu()


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
