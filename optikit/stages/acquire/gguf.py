"""Turn a gguf model into a model directory: float weights in safetensors, tokenizer and chat template kept.

Paper   none; the block formats are those of ggml (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
Helps   starting a stack from the only copy of a model that can be had
Hurts   the weights keep the rounding of the file: never call them the original ones
Cost    one pass over the weights, a few million of which are in memory at a time; 1 s for 20M weights
Note    float types are kept, F16 as F16; integer blocks are rounded to bf16 (f16 where dense matrices are), and how far
        that is from what they stand for is told; what only float32 holds is float32
Note    a file with embedding and head of one matrix, rounded twice, becomes a tied model with the finer of the two
Note    of a model in parts (`-00001-of-00003.gguf`) any is named
Differs names, order of rows and settings are translated here by rows of families, blocks by the `gguf` package
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optikit.errors import StageFailedError
from optikit.models.facts import DTYPE_BYTES, ModelFacts, Trait
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, Estimate, Facts, Job, StageOptions, directory_bytes, no_objection, nothing
from optikit.targets import Target

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, dtype

    from optikit.formats.gguf_weights import GgufWeights

SUMMARY = "dequantize a gguf file to a model directory of floats"
NEEDS = ANY
WRITES = "source"
USES_TARGET = False
LIBRARIES = ("torch", "transformers", "gguf", "safetensors", "tokenizers")
ENVIRONMENT = MAIN
inputs = nothing
fits = no_objection

OVERHEAD_BYTES = 420_000_000
"""Memory of the libraries, and of a piece with what it is made of."""
SECONDS_PER_WEIGHT = 5e-8


class Options(StageOptions):
    """There is nothing to choose."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield nothing: an architecture that can't be read is refused when the header is read."""
    yield from ()


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the model directory: dense, in the dtype that `read_gguf` told."""
    written = int(DTYPE_BYTES[facts.dtype] * facts.parameters)
    return replace(facts, weight_bytes=written, traits=frozenset[Trait]({"dense"}))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from the count of weights and the size of the vocabulary."""
    return Estimate(
        seconds=8 + SECONDS_PER_WEIGHT * facts.parameters + 1e-4 * facts.vocab,
        peak_bytes=OVERHEAD_BYTES + 1000 * facts.vocab,
        disk_bytes=directory_bytes(after(options, facts).weight_bytes, facts.vocab),
    )


def run(options: Options, job: Job) -> Facts:
    """Read the file `job.source`, write a model directory to `job.dest`.

    Returns:
        `tensor_types`: how many tensors the file has of each type; `parameters`: weights written; `dtype`: of most;
        `exact`: tensors whose values are the file's; `rounded`: the others; `largest_rounding`: how far the worst of
        them is from the file's, relative to its length.

    Raises:
        IntegrityError: A weight isn't finite, or the tokenizer's parts don't go together.
        RecipeError: A tokenizer that isn't read here.
        StageFailedError: If what was written isn't what the header promises.
    """
    from optikit.formats.gguf_weights import GgufWeights
    from optikit.stages.acquire import _tokenizer_from_gguf

    weights = GgufWeights(job.source)
    metadata = weights.header.metadata
    _tokenizer_from_gguf.require_known(metadata, job.source)
    written = _write_weights(job, weights)
    job.progress(len(weights.shapes), len(weights.shapes), "tokenizer")
    _tokenizer_from_gguf.write(job.source, job.dest, weights.facts.vocab)
    _write_config(job, weights.facts, _tokenizer_from_gguf.special_ids(metadata, weights.facts.vocab, job.source))
    _check(job, weights.facts)
    types = Counter(tensor.type for tensor in weights.header.tensors.values())
    found = {"tensor_types": dict(sorted(types.items())), **written.told(), "dtype": _WORDS[weights.facts.dtype]}
    return found | ({"one_matrix_twice": True} if weights.twice else {})


_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass
class _Written:
    """What was written: weights, tensors that have the file's values, others, and how far the worst of these is off."""

    parameters: int = 0
    exact: int = 0
    rounded: int = 0
    largest: float = 0.0

    def told(self) -> dict[str, Any]:
        """Return it as JSON."""
        rounding = {"largest_rounding": float(f"{self.largest:.3g}")} if self.rounded else {}
        return {"parameters": self.parameters, "exact": self.exact, "rounded": self.rounded, **rounding}


def _write_weights(job: Job, weights: GgufWeights) -> _Written:
    """Write every tensor, piece by piece."""
    from optikit.formats.checkpoint import DTYPES
    from optikit.formats.stream import ShardWriter

    promised, written = weights.dtypes(), _Written()
    writer = ShardWriter(job.dest, promised)
    for done, (name, wanted) in enumerate(promised.items()):
        job.progress(done, len(promised), name)
        apart = [0.0, 0.0]
        writer.write_pieces(name, _rounded(weights.pieces(name), DTYPES[wanted.dtype], apart))
        rounding = (apart[0] / apart[1]) ** 0.5 if apart[0] else 0.0
        written.parameters += wanted.elements
        written.exact += not rounding
        written.rounded += bool(rounding)
        written.largest = max(written.largest, rounding)
    writer.finish()
    return written


def _rounded(pieces: Iterator[Tensor], wanted: dtype, apart: list[float]) -> Iterator[Tensor]:
    """Yield pieces in a dtype; add up the squares of what that changes, and of the values."""
    for piece in pieces:
        found = piece.to(wanted)
        apart[0] += float((found.float() - piece).double().square().sum())
        apart[1] += float(piece.double().square().sum())
        yield found


def _write_config(job: Job, facts: ModelFacts, ids: dict[str, int]) -> None:
    """Write config.json as transformers' class of the family does, and what generation takes from it."""
    from transformers import AutoConfig, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    tokens = {f"{name}_id": ids.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    settings = {key: value for key, value in facts.config.items() if key != "model_type"}
    config = AutoConfig.for_model(facts.model_type, **settings, **tokens)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[facts.model_type]]
    config.dtype = _WORDS[facts.dtype]
    config.save_pretrained(job.dest)
    GenerationConfig.from_model_config(config).save_pretrained(job.dest)
    _strip(job.dest / "config.json", ("_model_name_or_path", "_name_or_path"))


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
    meant = found.config if found.architecture is None else found.architecture.meant(found.config)
    pairs += [(key, value, meant.get(key)) for key, value in wanted.config.items()]
    for name, promised, written in pairs:
        if written != promised:
            message = f"{job.source.name}: wrote {name} {written!r}, the file has {promised!r}"
            raise StageFailedError(message, fix="report this with the file's name")
