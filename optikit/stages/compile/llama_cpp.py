"""llama.cpp: one gguf file for llama.cpp, Ollama, LM Studio and whoever else reads gguf; a Modelfile beside it.

Codes that a quantize stage chose go into ggml's blocks as they are: symmetric 4-bit groups are Q4_0, asymmetric ones
Q4_1 or, where that would round an offset, Q5_0, 8-bit ones Q8_0; a group of 64 or 128 is two or four blocks with the
same scale. Everything written is read again and compared with the source, bit by bit where nothing was rounded, and
llama.cpp itself computes logits and decodes before the step counts as done. It all happens in a managed environment.

Helps   every program that reads gguf; decode at batch 1 on a CPU
Hurts   packed weights without blocks of ggml (NF4, int8 per channel, groups of 16) are rounded once more, to q8_0
Cost    a minute for 135 M weights; the environment compiles llama.cpp when it is built, 10 minutes and more
Note    K-quants exist in llama.cpp's C++ only: `llama-quantize` makes them of a file with `dense: bf16`
Note    llama.cpp rounds activations to int8 in quantized products, as accuracy level 4 of onnxruntime does
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from optikit.models import architectures, engines, traits
from optikit.models.facts import ModelFacts, Trait
from optikit.models.reader import tensor_shapes
from optikit.problems import Problem
from optikit.stage import ANY, DENSE, Estimate, Facts, Job, no_objection, nothing
from optikit.stages.compile._llama_cpp_options import BITS, Options, dense_kind, table_kind
from optikit.targets import Target

SUMMARY = "gguf file for llama.cpp and Ollama: codes of gptq and awq as they are, dense weights in f16, bf16 or q8_0"
NEEDS = ANY
WRITES = "engine"
USES_TARGET = False
LIBRARIES = ("llama-cpp-python", "gguf", "transformers", "torch")
ENVIRONMENT: str | None = "llama-cpp"
inputs = nothing
fits = no_objection

ENGINE = "llama.cpp"
TRIAL_TOKENS = 8
"""Tokens that the file has to decode before it is accepted."""
GRIDS: Mapping[str, float] = {"int4_gptq": BITS["Q4_0"], "int4_awq": BITS["Q5_0"], "int8_gptq": BITS["Q8_0"]}
"""Traits whose codes go into blocks, and the bits per weight that they take."""
POSITIONS = "wpe"
"""End of the name of a table of positions, which is float32 in gguf files."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what the target can't run, and what llama.cpp would compute otherwise."""
    if ENGINE not in target.engines:
        message = f"target {target.name!r} doesn't run {ENGINE}"
        fix = f"it runs {', '.join(target.engines)}" if target.engines else "choose target: cpu"
        yield Problem(code="engine-not-on-target", message=message, fix=fix)
    known = architectures.known_to(ENGINE)
    if facts.model_type not in known:
        message = f"gguf files of model_type {facts.model_type!r} aren't written here"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {', '.join(sorted(known))}")
        return
    yield from engines.unlike(ENGINE, facts)
    yield from _arithmetic(facts)
    if not facts.traits & {row.trait for row in traits.of(facts.traits)}:
        message = f"these weights can't be read: {', '.join(sorted(facts.traits))}"
        yield Problem(code="weights-not-readable", message=message, fix="compile from a model directory")


def _arithmetic(facts: ModelFacts) -> Iterator[Problem]:
    """Yield settings that llama.cpp's graph of a family doesn't look at."""
    config = facts.config
    family = facts.architecture
    left_out = family is not None and ENGINE in family.windowless
    if left_out and facts.sliding_window and facts.sliding_window < facts.max_positions:
        message = f"llama.cpp leaves out {facts.model_type}'s attention window: beyond {facts.sliding_window} tokens"
        fix = f"keep to {facts.sliding_window} tokens"
        yield Problem(code="window-left-out", message=f"{message} results differ", fix=fix, level="warning")
    scalar = config.get("query_pre_attn_scalar")
    if scalar is not None and scalar != facts.head_dim:
        message = f"query_pre_attn_scalar is {scalar}, and llama.cpp takes the head's width, {facts.head_dim}"
        yield Problem(code="attention-scale", message=message, fix="use another engine for this model")


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from SmolLM2-135M: tensors are converted one by one, and the reference is a block at a time."""
    written, table = after(options, facts).weight_bytes, 4 * facts.vocab * facts.hidden
    return Estimate(
        seconds=20 + facts.parameters / 1e7,
        peak_bytes=500_000_000 + 3 * table + facts.weight_bytes // 2,
        disk_bytes=written + 100 * facts.vocab,
    )


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the gguf file; asymmetric grids may take half a bit less than is counted."""
    linear, table = _linear_bits(options, facts), BITS[table_kind(options, facts)]
    size = 0.0
    for name, shape in tensor_shapes(facts).items():
        module, elements = name.removesuffix(".weight"), math.prod(shape)
        small = len(shape) == 1 or module.endswith(POSITIONS)
        size += elements * (32 if small else linear if module in facts.linears else table) / 8
    gone = frozenset[Trait]() if traits.bits(facts.traits) else DENSE
    return replace(facts.having("gguf", without=gone), weight_bytes=int(size))


def _linear_bits(options: Options, facts: ModelFacts) -> float:
    """Return the bits that a weight of a linear takes."""
    found = next((bits for trait, bits in GRIDS.items() if trait in facts.traits), None)
    if found is None:
        return BITS[dense_kind(options, facts)]
    settings = facts.config.get("quantization_config") or {}
    return BITS["Q5_0"] if "int4_gptq" in facts.traits and not settings.get("sym", False) else found


def run(options: Options, job: Job) -> Facts:
    """Write the file, compare it with the source, let llama.cpp compute and decode; in its environment.

    Raises:
        StageFailedError: A tokenizer that gguf has no words for, or llama.cpp doesn't load the file.
        IntegrityError: It holds another weight than the source, or computes something else.
    """
    from optikit.stages.compile import _gguf_verify, _gguf_write, _llama_cpp_compare

    job.progress(0, 3, "writing")
    written = _gguf_write.write(options, job)
    job.progress(1, 3, "comparing")
    found = _gguf_verify.compare(job.source, job.dest / _gguf_write.NAME, written)
    job.progress(2, 3, "decoding")
    return {**found, **_llama_cpp_compare.compare(job, TRIAL_TOKENS)}
