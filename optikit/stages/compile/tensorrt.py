"""TensorRT: an ONNX graph for TensorRT for RTX, which makes its engine of it where the GPU is, in seconds.

onnxruntime-genai's builder writes the graph in float16 or bfloat16, and it is checked as ONNX. TensorRT 11 is strongly
typed: what is in the graph is what will be computed. On the GPU, onnxruntime loads NVIDIA's plugin, and
onnxruntime-genai decodes.

Helps   one folder for any GPU from Ampere on: the engine is built at the first start
Hurts   batch 1; a server for many users wants `tensorrt-llm` or vLLM
Cost    seconds; memory of the builder: the weights in float16 and copies of the head
Note    the step is `emitted`: the graph was built and checked, no engine was, and nothing was timed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, no_objection, nothing
from optikit.stages.compile import _genai_builder
from optikit.stages.compile._tensorrt_options import Options
from optikit.targets import Target

SUMMARY = "ONNX graph for TensorRT on NVIDIA GPUs: built and checked here, made an engine of on the GPU"
NEEDS = DENSE
WRITES = "engine"
USES_TARGET = True
LIBRARIES = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")
ENVIRONMENT = MAIN
inputs = nothing
fits = no_objection

ENGINE = "tensorrt"
LEAST_CAPABILITY = 80
"""TensorRT for RTX runs on Ampere and newer."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what the builder can't read, or the target can't run."""
    if ENGINE not in target.engines:
        message = f"target {target.name!r} doesn't run {ENGINE}"
        fix = f"it runs {', '.join(target.engines)}" if target.engines else "choose an NVIDIA target"
        yield Problem(code="engine-not-on-target", message=message, fix=fix)
    elif (target.compute_capability or LEAST_CAPABILITY) < LEAST_CAPABILITY:
        message = f"TensorRT for RTX needs compute capability 8.0, and {target.name} has {target.capability}"
        yield Problem(code="gpu-too-old", message=message, fix="choose an Ampere or newer GPU")
    yield from _genai_builder.problems(facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from the CPU builder: the weights, and copies of the head."""
    written = after(options, facts).weight_bytes
    held = 6 * facts.parameters
    return Estimate(
        seconds=15 + facts.parameters / 2e7,
        peak_bytes=450_000_000 + held,
        disk_bytes=written,
        scratch_bytes=2 * written,
    )


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the graph, which keeps an embedding beside the head also where they are tied."""
    tables = 2 * 2 * facts.vocab * facts.hidden
    size = 2 * facts.linear_elements + tables + 4 * facts.layers * facts.hidden
    return replace(facts.having("tensorrt"), weight_bytes=size)


def run(options: Options, job: Job) -> Facts:
    """Build the graph, check it, write the script that runs it and a README.

    Raises:
        StageFailedError: The builder failed, or wrote what isn't ONNX.
    """
    from optikit.stages.compile import _tensorrt_folder

    return _tensorrt_folder.write(options, job)


def absent(options: Options) -> str:
    """Say why what was emitted can't be finished on this machine; "" where it can."""
    import importlib.util

    from optikit.stages.compile import _finish

    if not _finish.GPU.exists():
        return "there is no NVIDIA GPU here"
    found = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    return "" if found else "NVIDIA's plugin for onnxruntime isn't installed: see requirements.txt of the folder"


def finish(options: Options, job: Job) -> Facts:
    """Let the folder's own script make the engine and decode 8 tokens.

    Raises:
        StageFailedError: It failed.
    """
    import sys

    from optikit.stages.compile import _finish

    _finish.unpack(job)
    said = _finish.script("run.py", [sys.executable, "run.py", "The capital of France is", "8"], job)
    _finish.drop_links(job.dest)
    return {"decoded": said}
