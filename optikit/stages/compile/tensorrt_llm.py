"""TensorRT-LLM: a folder for NVIDIA GPUs, `trtllm-serve` on the Hugging Face directory with its PyTorch backend.

Since 1.0 TensorRT-LLM serves checkpoints as they are; engines built ahead are deprecated in 1.2 and gone in 1.3. So
there is nothing to compile: what is written is the server's configuration, a script that starts it, one that asks it
for 8 tokens, a Dockerfile, and the checkpoint's configuration as the server's transformers reads it. The weights stay
in `model/`.

Helps   throughput under load on Ampere and newer: in-flight batching, paged cache, fused kernels
Hurts   it loads fewer formats than vLLM: gptq (4 bits, groups of 64 or 128) in new releases, no awq, no int8
Cost    nothing here; a minute to start there
Note    the step is `emitted`: its files were written and checked, nothing was run or timed
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, Estimate, Facts, Input, Job
from optikit.stages.compile import _speculators
from optikit.stages.compile._trtllm_options import Options
from optikit.targets import Target

SUMMARY = "serving folder for TensorRT-LLM on NVIDIA GPUs: configuration and scripts, started on the GPU"
NEEDS = ANY
WRITES = "engine"
USES_TARGET = True
LIBRARIES = ("tensorrt-llm",)
ENVIRONMENT = MAIN

ENGINE = "tensorrt-llm"
PORT = "8179"
"""Where the server listens while it is asked for its first tokens."""
FP8_CAPABILITY = 89
"""Least compute capability, times ten, with fp8 arithmetic."""


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare the draft that is named, or else what a speculate stage has made."""
    return _speculators.inputs(options.draft)


def drafts(options: Options, facts: ModelFacts, models: Mapping[str, ModelFacts]) -> ModelFacts | None:
    """Return the facts of the draft that is named here; one that a stage before makes is that stage's to tell."""
    return models.get("draft")


fits = _speculators.fits


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be served so; formats, GPUs and memory are a matter of rules."""
    if ENGINE not in target.engines:
        message = f"target {target.name!r} doesn't run {ENGINE}"
        fix = f"it runs {', '.join(target.engines)}" if target.engines else "choose a GPU of Ampere or newer"
        yield Problem(code="engine-not-on-target", message=message, fix=fix)
    if options.sequence_length > facts.max_positions:
        message = f"sequence_length {options.sequence_length} is beyond the model's {facts.max_positions} positions"
        fix = f"use {facts.max_positions} or less"
        yield Problem(code="longer-than-model", message=message, fix=fix, loc=("sequence_length",))
    if options.kv_cache_dtype == "fp8" and (target.compute_capability or FP8_CAPABILITY) < FP8_CAPABILITY:
        message = f"an fp8 cache needs compute capability 8.9, and {target.name} has {target.capability}"
        yield Problem(code="no-fp8", message=message, fix="use kv_cache_dtype: auto", loc=("kv_cache_dtype",))
    yield from _check_speculation(options, facts)


UNUSED = {"medusa_heads": "Medusa heads: its PyTorch backend has none", "eagle3": "this EAGLE-3 layout"}
"""Traits of what a speculate stage makes that a folder can't hold → why."""


def _check_speculation(options: Options, facts: ModelFacts) -> Iterator[Problem]:
    made = "draft_model" in facts.traits
    there = made or bool(options.draft)
    if (options.speculation == "draft") != there:
        message = f"speculation is {options.speculation}, and {'a' if there else 'no'} draft is there"
        fix = "name a draft model, or have one made, exactly where speculation is draft"
        yield Problem(code="half-a-speculation", message=message, fix=fix, loc=("speculation",))
    if options.draft and made:
        message = f"a stage before made a draft, and {options.draft!r} is named here"
        yield Problem(code="two-drafts", message=message, fix="drop one of them", loc=("draft",))
    yield from _unused(options, facts)
    if options.speculation != "none" and options.overlap_scheduler:
        message = f"speculation by {options.speculation} can't run with the overlap scheduler"
        fix = "set overlap_scheduler: false"
        yield Problem(code="overlap-scheduler", message=message, fix=fix, loc=("overlap_scheduler",))


def _unused(options: Options, facts: ModelFacts) -> Iterator[Problem]:
    """Yield what a stage before has made, and the folder would leave unused."""
    for what in (what for trait, what in UNUSED.items() if trait in facts.traits):
        message = f"{ENGINE} {options.version} can't be given {what}; what was made would be left unused"
        yield Problem(code="speculator-unused", message=message, fix="drop the speculate stage, or use method draft")
    if "prompt_lookup" in facts.traits and options.speculation != "lookup":
        message = f"a stage before chose lookup, and speculation is {options.speculation}"
        yield Problem(code="speculator-unused", message=message, fix="set speculation: lookup", loc=("speculation",))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Writing a few pages takes no time worth estimating."""
    return Estimate(seconds=1, peak_bytes=150_000_000, disk_bytes=20_000)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the same facts: the server loads the directory as it is."""
    return facts.having("tensorrt")


def run(options: Options, job: Job) -> Facts:
    """Write the serving folder.

    Raises:
        IntegrityError: The job names no target.
    """
    from optikit.stages.compile import _trtllm_folder

    return _trtllm_folder.write(options, job)


def absent(options: Options) -> str:
    """Say why what was emitted can't be finished on this machine; "" where it can."""
    from optikit.stages.compile import _finish

    return _finish.lacking(("trtllm-serve", "curl")) if _finish.GPU.exists() else "there is no NVIDIA GPU here"


def finish(options: Options, job: Job) -> Facts:
    """Start the server with the folder's own script and ask it for 8 tokens.

    Raises:
        StageFailedError: It didn't start, or didn't answer.
    """
    from optikit.stages.compile import _finish

    _finish.unpack(job)
    said = _finish.asked(["sh", "serve.sh"], ["sh", "smoke.sh"], job, {"PORT": PORT})
    _finish.drop_links(job.dest)
    return {"answered": said}
