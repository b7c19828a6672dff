"""Turn a gguf file into a model directory: weights dequantized to bf16 safetensors, tokenizer and chat template kept.

Paper   none; the block formats are those of ggml (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
Helps   starting a stack from the only copy of a model that can be had
Hurts   the weights keep the rounding of the file: never call them the original ones
Cost    20 to 40 s for 135M parameters, most of it reading the token lists; memory of the model, twice
Note    a file with embedding and head of one matrix, rounded twice, becomes a tied model with the finer of the two
Differs transformers' reader does the work, with `dequantize`; its notes about where a model came from are left out
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError, StageFailedError
from optikit.models import gguf_tied
from optikit.models.facts import ModelFacts, Trait
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, Estimate, Facts, Job, StageOptions, directory_bytes, no_objection, nothing
from optikit.targets import Target

if TYPE_CHECKING:
    from torch import Tensor

    from optikit.models.gguf_header import GgufHeader

SUMMARY = "dequantize a gguf file to a bf16 model directory"
NEEDS = ANY
WRITES = "source"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "gguf", "safetensors", "tokenizers")
ENVIRONMENT = MAIN
inputs = nothing
fits = no_objection

ROWS = 4096
"""Rows of an embedding compared at a time: bounds the memory."""
OUTLYING = 4
"""How much coarser than usual a row is rounded whose blocks have one large weight each: 1.63 / 0.58, and some."""


class Options(StageOptions):
    """There is nothing to choose."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield nothing: an architecture that can't be read is refused when the header is read."""
    yield from ()


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the model directory: dense, two bytes a weight."""
    return replace(facts, dtype="BF16", weight_bytes=2 * facts.parameters, traits=frozenset[Trait]({"dense"}))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from the count of weights and the size of the vocabulary (SmolLM2-135M: 31 s, 891 MiB)."""
    written = 2 * facts.parameters
    return Estimate(
        seconds=8 + 6e-8 * facts.parameters + 2e-4 * facts.vocab,
        peak_bytes=350_000_000 + 23 * written // 10,
        disk_bytes=directory_bytes(written, facts.vocab),
    )


def run(options: Options, job: Job) -> Facts:
    """Read the file `job.source`, write a model directory to `job.dest`.

    Returns:
        `tensor_types`: how many tensors the file has of each type; `parameters`: weights written.

    Raises:
        IntegrityError: If a weight isn't finite.
        StageFailedError: If what was written isn't what the header promises.
    """
    from optikit.models.gguf_header import read_header
    from optikit.models.reader import read_gguf

    header, wanted = read_header(job.source), read_gguf(job.source)
    job.progress(0, 3, "weights")
    parameters = _write_weights(job, wanted)
    job.progress(2, 3, "tokenizer")
    _write_tokenizer(job, header.metadata)
    _check(job, wanted)
    job.progress(3, 3, "checked")
    types = Counter(tensor.type for tensor in header.tensors.values())
    found = {"tensor_types": dict(sorted(types.items())), "parameters": parameters}
    return found | ({"one_matrix_twice": True} if wanted.tied and gguf_tied.HEAD in header.tensors else {})


def _write_weights(job: Job, wanted: ModelFacts) -> int:
    """Read the weights into a model of the settings that the header's every key was read for; save it.

    transformers' own reading of the header knows neither scaled rotary embeddings nor biases.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    from optikit.formats.checkpoint import finite
    from optikit.models.gguf_header import read_header

    config = AutoConfig.from_pretrained(job.source.parent, gguf_file=job.source.name, local_files_only=True)
    for key, value in wanted.config.items():
        if key != "model_type":
            setattr(config, key, value)
    model = AutoModelForCausalLM.from_pretrained(
        job.source.parent,
        config=config,
        gguf_file=job.source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    header = read_header(job.source)
    if wanted.tied and gguf_tied.HEAD in header.tensors:
        _keep_finer(job.source, header, model.get_input_embeddings().weight)
        model.tie_weights()
    for name, weight in model.named_parameters():
        finite(name, weight, job.source)
    job.progress(1, 3, "weights")
    model.save_pretrained(job.dest)
    _strip(job.dest / "config.json", ("_model_name_or_path", "_name_or_path"))
    return sum(weight.numel() for weight in model.parameters())


def _keep_finer(path: Path, header: GgufHeader, embedding: Tensor) -> None:
    """Fill the embedding (vocabulary, hidden), in place, with the better rounded one of a matrix that is there twice.

    Raises:
        IntegrityError: The two aren't the same in all rows.
    """
    import torch

    pair = [header.tensors[name] for name in (gguf_tied.finer(header), gguf_tied.coarser(header))]
    for start in range(0, len(embedding), ROWS):
        count = min(ROWS, len(embedding) - start)
        kept, other = (gguf_tied.read_rows(path, each, start, count) for each in pair)
        wrong = ~(gguf_tied.distance(kept, other) <= OUTLYING * gguf_tied.explained(header))
        if wrong.any():
            row = start + int(wrong.argmax())
            message = f"{path.name}: embedding and head are one matrix, but for row {row}, where they are apart"
            raise IntegrityError(message, fix="get the file again, or start from the model's safetensors directory")
        embedding.data[start : start + count] = torch.from_numpy(kept.copy())


def _write_tokenizer(job: Job, metadata: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.source.parent, gguf_file=job.source.name, local_files_only=True)
    if metadata.get("tokenizer.chat_template") and not tokenizer.chat_template:
        raise StageFailedError(f"{job.source.name}: its chat template was lost", fix="report this with the file's name")
    tokenizer.save_pretrained(job.dest)
    _strip(job.dest / "tokenizer_config.json", ("is_local", "local_files_only", "name_or_path"))


def _strip(path: Path, keys: tuple[str, ...]) -> None:
    """Take out of a configuration where it was read from: that isn't the model, and must not decide a digest."""
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check(job: Job, wanted: ModelFacts) -> None:
    """Re-open what was written and compare it with the header of what was read."""
    from optikit.models.reader import read

    found = read(job.dest)
    pairs = [
        (name, getattr(wanted, name), getattr(found, name))
        for name in ("linears", "vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "tied", "dtype")
    ]
    pairs += [(key, value, found.config.get(key)) for key, value in wanted.config.items()]
    for name, promised, written in pairs:
        if written != promised:
            message = f"{job.source.name}: wrote {name} {written!r}, the file has {promised!r}"
            raise StageFailedError(message, fix="report this with the file's name")
