"""Depth pruning over a checkpoint: measure every block's influence in one pass, then leave blocks out by renaming.

Two files of hidden states and one block are all that is held; nothing is computed twice after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from optikit.algorithms import depth
from optikit.algorithms.precision import compute_dtype
from optikit.calibration import calibration_set
from optikit.calibration.budget import BATCH_TOKENS
from optikit.calibration.empty_model import Call, EmptyModel
from optikit.calibration.resume import HiddenStates, ResumeState
from optikit.calibration.source_model import SourceModel
from optikit.formats.checkpoint import Checkpoint
from optikit.process.allocator import one_arena, return_memory
from optikit.stage import Calibration, Job


def influences(job: Job, calibration: Calibration) -> list[float]:
    """Return the mean block influence of every block on the calibration text.

    Raises:
        StageFailedError: Unknown architecture, damaged weights, text that is too short.
    """
    torch.set_num_threads(job.threads)
    one_arena(bounded=job.max_memory_bytes is not None)
    source = SourceModel(Checkpoint(job.source))
    dtype = compute_dtype(job.device)
    shape = (calibration.samples, calibration.length)
    identity = {"method": "depth", "dtype": str(dtype), "seed": job.seed, "windows": list(shape)}
    state = ResumeState(job.scratch, identity, job.note)
    if state.done < source.layers:
        with torch.no_grad():
            _measure(job, calibration, source, state, dtype)
    tokens = calibration.samples * calibration.length
    return [float(state.facts[str(index)]) / tokens for index in range(source.layers)]


def _measure(job: Job, calibration: Calibration, source: SourceModel, state: ResumeState, dtype: torch.dtype) -> None:
    model = EmptyModel(source, dtype=dtype, device=job.device)
    samples, length = calibration.samples, calibration.length
    tokens = calibration_set.draw(job.source, calibration.text, samples=samples, length=length, seed=job.seed)
    batch = 1 if source.row.alone else max(1, BATCH_TOKENS // length)

    def hidden(index: int) -> HiddenStates:
        return HiddenStates(state.hidden_path(index), (samples, length, model.width), dtype, batch)

    with model.stem_filled():
        calls = model.record(tokens[:1])
        if not hidden(state.done).intact(state.hidden_sha256):
            state.reset()
            hidden(0).write(model.embedded(tokens, batch))
    for index in range(state.done, source.layers):
        changes: list[float] = []
        block = model.fill_block(index)
        digest = hidden(index + 1).write(_outputs(block, calls[index], hidden(index), job.device, changes))
        model.empty_block(index)
        return_memory()
        state.commit({}, [], {str(index): sum(changes)}, digest)
        job.progress(index + 1, source.layers, "block")
    hidden(source.layers).path.unlink()


def _outputs(block: nn.Module, call: Call, hidden: HiddenStates, device: str, changes: list[float]) -> Iterator[Tensor]:
    for index in range(hidden.batches):
        before = hidden.read(index).to(device)
        output = block(before, *call.args, **call.kwargs)
        after = output[0] if isinstance(output, tuple) else output
        changes.append(depth.influence(before, after))
        yield after.cpu()
