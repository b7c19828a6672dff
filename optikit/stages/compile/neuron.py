"""AWS Neuron: a job folder for Inferentia and Trainium that an engineer finishes with one command on the instance.

Neuron's compiler comes from Amazon's own package index and its results run on Neuron cores only, so what is written
here is everything up to that: scripts, requirements, a Dockerfile, the libraries' own configuration, the checkpoint's
configuration as those libraries' transformers reads it, and a README with the commands. The weights stay in `model/`.

Helps   price per token on Inferentia2 and Trainium; the folder pins what has to fit together
Hurts   fixed shapes: batch and sequence length are compiled in, every request pays for all of them
Cost    nothing here; 5 to 60 minutes of compiling there, once per shapes, dtype, degree, compiler and flags
Note    the step is `emitted`: its files were written and checked, nothing was compiled or timed
Note    `optimum-neuron` compiles Llama-like models and serves them through its vLLM 0.11 plugin; `nxd-inference` has
        int8 and fp8 weights and fused speculation, and is in maintenance; `vllm-neuron` is its successor on Trainium2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from optikit.models import architectures
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, Estimate, Facts, Input, Job
from optikit.stages.compile import _speculators
from optikit.stages.compile._neuron_options import (
    PLATFORMS,
    TAKES,
    Kind,
    Options,
    core_set,
    instance_family,
    kind_of,
    placement,
    shapes,
)
from optikit.targets import Target
from optikit.targets.neuron import compiled_bytes, fitting, told

SUMMARY = "job folder for AWS Inferentia and Trainium: scripts and configuration, compiled on the instance"
NEEDS = ANY
WRITES = "engine"
USES_TARGET = True
LIBRARIES = ("neuronx-cc", "optimum-neuron")
ENVIRONMENT = MAIN


NXD = "nxd-inference"


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare the draft that is named, or else what a speculate stage has made."""
    return _speculators.inputs(options.draft)


def drafts(options: Options, facts: ModelFacts, models: Mapping[str, ModelFacts]) -> ModelFacts | None:
    """Return the facts of the draft that is named here; one that a stage before makes is that stage's to tell."""
    return models.get("draft")


fits = _speculators.fits


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what the backend doesn't know; formats, degrees and memory are a matter of rules."""
    if options.sequence_length > facts.max_positions:
        message = f"sequence_length {options.sequence_length} is beyond the model's {facts.max_positions} positions"
        fix = f"use {facts.max_positions} or less"
        yield Problem(code="longer-than-model", message=message, fix=fix, loc=("sequence_length",))
    family = instance_family(target)
    if options.backend == "optimum-neuron" and target.device == "neuron" and family not in PLATFORMS:
        message = f"optimum-neuron 0.4.5 can't compile for {target.name}: it knows {', '.join(PLATFORMS)}"
        yield Problem(code="unknown-instance", message=message, fix="use backend vllm-neuron", loc=("backend",))
    if options.backend == NXD and facts.model_type not in architectures.known_to(NXD):
        message = f"nxd-inference's command line doesn't know model_type {facts.model_type!r}"
        fix = f"use backend optimum-neuron; known here: {', '.join(architectures.known_to(NXD))}"
        yield Problem(code="unknown-architecture", message=message, fix=fix, loc=("backend",))
    yield from _check_only_nxd(options)
    yield from _check_speculation(options, facts)
    yield from _check_cores(options, target)
    if options.backend == "vllm-neuron" and options.cache.startswith("s3://"):
        message = "vllm-neuron keeps its compile cache under VLLM_CACHE_ROOT, a directory"
        yield Problem(code="cache-not-a-directory", message=message, fix="name a directory", loc=("cache",))


def _check_only_nxd(options: Options) -> Iterator[Problem]:
    if options.backend == "nxd-inference":
        return
    chosen = {
        "quantization_dtype": options.quantization_dtype is not None,
        "quantized_checkpoints_path": options.quantized_checkpoints_path is not None,
        "async_mode": options.async_mode,
        "speculation": options.speculation == "fused",
    }
    if options.backend == "vllm-neuron":
        chosen["on_device_sampling"] = options.on_device_sampling is False
    for name in (name for name, is_chosen in chosen.items() if is_chosen):
        message = f"{name} {getattr(options, name)!s} can't be chosen with backend {options.backend}"
        yield Problem(code="not-this-backend", message=message, fix="use backend nxd-inference", loc=(name,))


def _check_cores(options: Options, target: Target) -> Iterator[Problem]:
    last = options.first_core + options.tensor_parallel
    if options.first_core and target.cores is not None and last > target.cores:
        message = f"cores {core_set(options)} were asked for, and {target.name} has {target.cores}"
        most = target.cores - options.tensor_parallel
        fix = f"lower first_core to {most} or less" if most >= 0 else "lower tensor_parallel"
        yield Problem(code="no-such-cores", message=message, fix=fix, loc=("first_core",))


def _check_speculation(options: Options, facts: ModelFacts) -> Iterator[Problem]:
    """Yield why what drafts can't be used: it must not vanish in silence."""
    kind = kind_of(options, facts)
    if options.draft and "draft_model" in facts.traits:
        message = f"a stage before made a draft, and {options.draft!r} is named here"
        yield Problem(code="two-drafts", message=message, fix="drop one of them", loc=("draft",))
    if kind not in TAKES[options.backend]:
        yield from _unused(options, kind)
        return
    yield from _check_length(options, kind)
    yield from _check_sampling(options, kind)


def _unused(options: Options, kind: Kind) -> Iterator[Problem]:
    """Yield that a backend can't use what drafts, where no rule says so."""
    told = options.backend == "vllm-neuron" or kind == "medusa"  # vllm-neuron-speculation, neuron-medusa-backend
    if options.draft or not told:
        message = f"backend {options.backend} can't speculate with {kind}: what was made would be left unused"
        fix = "drop it, or choose another backend"
        yield Problem(code="speculator-unused", message=message, fix=fix, loc=("backend",))


def _check_length(options: Options, kind: Kind) -> Iterator[Problem]:
    needs = kind in ("draft", "eagle3")
    if needs != bool(options.speculation_length):
        message = f"speculation_length is {options.speculation_length}, and {DRAFTS[kind]}"
        fix = "set speculation_length: 5" if needs else "set speculation_length: 0"
        yield Problem(code="half-a-speculation", message=message, fix=fix, loc=("speculation_length",))
    elif kind in ("draft", "medusa") and options.batch_size > 1:
        message = f"{kind} speculation is for one sequence at a time, and batch_size is {options.batch_size}"
        yield Problem(code="speculation-batch", message=message, fix="set batch_size: 1", loc=("batch_size",))


DRAFTS: Mapping[Kind, str] = {
    "": "nothing drafts",
    "draft": "a draft drafts",
    "medusa": "Medusa heads draft, as many tokens as there are heads",
    "eagle3": "an EAGLE-3 drafter drafts",
    "lookup": "lookup drafts",
}
"""What drafts, in words."""


def _check_sampling(options: Options, kind: Kind) -> Iterator[Problem]:
    fused = options.backend == NXD and options.speculation == "fused"
    if options.acceptor == "rejection" and not (kind == "eagle3" or (kind == "draft" and fused)):
        message = "acceptor rejection needs fused speculation with a draft (nxd-inference), or eagle3 (vllm-neuron)"
        yield Problem(code="no-such-acceptor", message=message, fix="use acceptor: greedy", loc=("acceptor",))
    wanted = options.on_device_sampling
    if options.backend == NXD and kind in ("draft", "medusa") and wanted is not None and wanted is not fused:
        message = (
            f"on_device_sampling {str(wanted).lower()} can't be with {'fused' if fused else 'vanilla'} speculation: "
        )
        message += "one program chooses tokens on the device, two compare logits"
        yield Problem(code="speculation-sampling", message=message, fix="leave it out", loc=("on_device_sampling",))


def placed(options: Options, target: Target, models: Sequence[ModelFacts], medusa_heads: int) -> list[str]:
    """Say what lies on which cores, what padding costs, and at which degrees it would fit."""
    found = placement(options, models[0], models[1:], medusa_heads)
    fit = {*fitting(target, models, shapes(options), medusa_heads=medusa_heads)}
    if found.fits(target):
        fit.add(found.degree)  # which only older texts may allow
    names = ("model", *("draft" for _ in models[1:]))
    return told(found, target, models, names, sorted(fit))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Writing a few pages takes no time worth estimating; compiling happens elsewhere."""
    return Estimate(seconds=1, peak_bytes=150_000_000, disk_bytes=50_000)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the model that the instance will hold: its weights, in the dtype that is compiled in."""
    return replace(facts.having("neuron"), weight_bytes=compiled_bytes(facts, shapes(options)))


def run(options: Options, job: Job) -> Facts:
    """Write the job folder.

    Raises:
        IntegrityError: The source isn't a model directory.
    """
    from optikit.stages.compile import _neuron_folder

    return _neuron_folder.write(options, job)


def absent(options: Options) -> str:
    """Say why what was emitted can't be finished on this machine; "" where it can. Compiling needs no device."""
    from optikit.stages.compile import _finish

    if options.backend == "vllm-neuron":
        return "vLLM compiles when its server starts: run run.sh of the folder"
    tool = "optimum-cli" if options.backend == "optimum-neuron" else "inference_demo"
    return _finish.lacking((tool, "neuronx-cc"))


def finish(options: Options, job: Job) -> Facts:
    """Compile with the emitted folder's own script, which decodes where a Neuron device is.

    Raises:
        StageFailedError: It failed, or left no result.
    """
    from optikit.errors import StageFailedError
    from optikit.models.strict_json import read_object
    from optikit.stages.compile import _finish

    _finish.unpack(job)
    made = _finish.script("compile.sh", ["sh", "compile.sh"], job)
    result = job.dest / made / "result.json"
    if not made or not result.is_file():
        message = f"compile.sh ended without an error and left no result: it printed {made!r} last"
        raise StageFailedError(message, fix=f"its log is {job.scratch / _finish.LOG}")
    _finish.drop_links(job.dest)
    found = read_object(result)
    return {"compiled": made, "key": found["key"], "versions": found["versions"], "compiled_files": len(found["files"])}
