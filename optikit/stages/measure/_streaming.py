"""What scoring text takes with a model in memory, and block by block where it is larger; and which of these is done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optikit import host
from optikit.evaluation.windows import BATCH_TOKENS
from optikit.models.facts import ModelFacts
from optikit.models.reader import read
from optikit.stage import Estimate, Job

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from optikit.evaluation.streamed import Streamed
    from optikit.runtime.decoder import Decoder

MIB, GIB = 2**20, 2**30
LIBRARIES_MIB = {"transformers": 500, "onnxruntime": 200, "openvino": 390, "llama-cpp": 150}
"""What a process takes with a runtime and without a model."""
LOADING_MIB = 400
"""The same while transformers loads one."""
LOGIT_BYTES = 256 * 12
"""Memory for a chunk of logits, per word of the vocabulary."""


def whole_bytes(facts: ModelFacts, runtime: str, length: int) -> int:
    """Return the memory of a process that holds the whole model, while it is loaded or reads texts of `length` tokens.

    transformers maps a dense file whose weights it converts: its pages count until all are.
    """
    reading = LOGIT_BYTES * facts.vocab + 3 * facts.heads * length**2 + LIBRARIES_MIB[runtime] * MIB
    if runtime != "transformers":
        return facts.weight_bytes + reading
    mapped = facts.weight_bytes if facts.dtype != "F32" and "dense" in facts.traits else 0
    return 4 * facts.parameters + max(reading, LOADING_MIB * MIB + mapped)


def streaming(whole: Estimate, facts: ModelFacts, *, length: int, tokens: int) -> Estimate:
    """Return an estimate with what is taken where blocks are read one after another, then embedding and head.

    Args:
        whole: What the whole model in memory takes.
        facts: The model.
        length: Tokens of a text.
        tokens: Of all texts: their hidden states lie on disk, before a block and after it.
    """
    if facts.experts and "dense" not in facts.traits:
        return whole  # packed experts are unpacked all at once
    largest = max((rows * columns for rows, columns in facts.linears.values()), default=0)
    block = 4 * facts.linear_elements // max(facts.layers, 1) * (2 if facts.experts else 1)  # experts are stacked
    block += 4 * largest  # one linear as it is stored
    way = 4 * max(BATCH_TOKENS, length) * (6 * facts.hidden + 3 * facts.intermediate) + 3 * facts.heads * length**2
    first = 4 * facts.vocab * facts.hidden + block  # what blocks are called with is learnt from the embedding's outputs
    ends = 4 * facts.vocab * facts.hidden * (1 if facts.tied else 2) + LOGIT_BYTES * facts.vocab
    peak = LIBRARIES_MIB["transformers"] * MIB + max(block + way, first, ends)
    return replace(whole, streamed=replace(whole, peak_bytes=peak, scratch_bytes=8 * tokens * facts.hidden))


def opened(
    job: Job, estimate: Callable[[ModelFacts], Estimate], *, runtime: str, dtype: str, max_tokens: int
) -> Decoder | Streamed:
    """Return a step's model: the whole of it, or where that doesn't fit what reads it block by block.

    Args:
        job: The step; its memory bound counts as far as this machine has so much.
        estimate: Returns what reading a model takes, either way.
        runtime: Which runtime loads it; only models for transformers are read block by block.
        dtype: Of weights and arithmetic, or `auto`.
        max_tokens: Longest text.
    """
    room = host.room_bytes(job.max_memory_bytes)
    expected = estimate(read(job.source)) if runtime == "transformers" else None
    if expected is not None and expected.streamed is not None and expected.peak_bytes > room:
        from optikit.evaluation.streamed import Streamed

        need = f"{expected.peak_bytes / GIB:.1f} GiB, and there are {room / GIB:.1f}"
        job.note(f"the whole model would take {need}: it is read block by block")
        return Streamed(job.source, dtype=dtype, threads=job.threads, device=job.device)
    from optikit.runtime import load

    given: dict[str, Any] = {"dtype": dtype, "threads": job.threads, "max_tokens": max_tokens}
    return load(job.source, runtime=runtime, device=job.device, **given)


def is_streamed(model: Decoder | Streamed) -> TypeIs[Streamed]:
    """Return whether a model is read block by block, without the libraries of that where none is."""
    streamed = sys.modules.get("optikit.evaluation.streamed")
    return streamed is not None and isinstance(model, streamed.Streamed)
