"""Compare what llama.cpp computes from a gguf file with what transformers computes with the same weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError, StageFailedError
from optikit.process import program
from optikit.stages.compile._gguf_settings import ENGINE
from optikit.stages.compile._logits import FIX, probe, relative_distance, short

if TYPE_CHECKING:
    from optikit.stage import Job

TRIAL = "optikit.stages.compile._llama_cpp_trial"
APART = {True: 0.4, False: 0.05}
"""Relative distance of logits that llama.cpp's rounding of activations doesn't explain: to int8 where weights are
quantized, else to their dtype. Right files: 0.11 (SmolLM2-135M, Q4_0) and 0.004 (tiny ones, BF16)."""
TEXTS = ("The capital of France is", "x = [1, 22, 333]\n\tfor  y", "Grüße, 世界! 🙂", " a", "It's 2026.")
"""What both tokenizers cut."""


def compare(job: Job, tokens: int) -> dict[str, Any]:
    """Return how far logits are apart, whether tokenizers agree, and what llama.cpp decoded.

    Raises:
        IntegrityError: It computes something else than the model, or cuts texts otherwise.
        StageFailedError: It doesn't load the file.
    """
    import numpy as np
    import torch

    from optikit.calibration.reference_logits import ReferenceModel
    from optikit.models.reader import read
    from optikit.runtime.decoders.llama_cpp import MODEL, stored_dtype
    from optikit.stages.compile._gguf_verify import file_weights

    facts = read(job.source)
    family = facts.architecture
    left_out = family is not None and ENGINE in family.windowless
    text = probe(facts, facts.sliding_window if left_out and facts.sliding_window else facts.max_positions)
    job.scratch.mkdir(parents=True, exist_ok=True)
    files = [str(job.scratch / name) for name in ("tokens.npy", "logits.npy", "texts.json")]
    np.save(files[0], text.numpy())
    (job.scratch / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    said = json.loads(program.trial("decoding with llama.cpp", TRIAL, job, *files, str(tokens), str(job.threads)))
    found = torch.from_numpy(np.load(files[1], allow_pickle=False))
    wanted = ReferenceModel(job.source, file_weights(job.source, job.dest)).logits(text)
    apart = relative_distance(found, wanted)
    limit = APART[stored_dtype(job.dest / MODEL).startswith("int")]
    if not apart <= limit:
        message = f"llama.cpp computes something else than the model: its logits are {apart:.2g} of their spread apart"
        raise IntegrityError(f"{message}, and rounding activations explains {limit:g}", fix=FIX)
    _require_same_tokens(job, said.pop("texts"))
    return {"logits_compared": len(text), "logits_apart": short(apart), "trial": said}


def _require_same_tokens(job: Job, found: list[list[int]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(job.source), local_files_only=True)
    for text, ids in zip(TEXTS, found, strict=True):
        wanted = tokenizer(text).input_ids
        if ids != wanted:
            message = f"llama.cpp cuts {text!r} to {len(ids)} other tokens than transformers' {len(wanted)}"
            raise StageFailedError(message, fix="say what llama.cpp calls these cuts: pre_tokenizer: NAME")
