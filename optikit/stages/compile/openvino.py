"""OpenVINO: an IR for CPUs, int8 or int4 weights by NNCF, served by openvino-genai and OpenVINO Model Server.

optimum-intel exports the dense model with its cache inside the graph, NNCF rounds the weights, and a child process
decodes with openvino-genai itself. It all happens in a managed environment: optimum-intel stops below transformers 5.6.
What comes out needs neither torch nor transformers.

Paper   AWQ: Lin et al. 2023, arXiv:2306.00978; scale estimation and mixed precision: NNCF 3.4, compress_weights
Helps   decode at batch 1; a server with continuous batching, paged cache, draft models and prompt lookup
Hurts   int4 without calibration text costs more quality than GPTQ does at the same size
Cost    a minute for 135 M weights in int8; awq and scale_estimation run the calibration text through the model
Note    weights that a quantize stage packed can't be exported without gptqmodel: compile from dense ones
Note    AMD processors aren't supported officially: the trial decode is what tells
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

from optikit.models import architectures, engines
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, Estimate, Facts, Input, Job, no_objection
from optikit.stages.compile._openvino_options import Options, calibrated, group
from optikit.targets import Target

SUMMARY = "OpenVINO IR for CPUs: int8 or int4 weights by NNCF, with AWQ and scale estimation if asked for"
NEEDS = DENSE
WRITES = "engine"
USES_TARGET = False
LIBRARIES = ("openvino", "openvino-genai", "openvino-tokenizers", "nncf", "optimum-intel", "transformers", "torch")
ENVIRONMENT: str | None = "openvino"
fits = no_objection

ENGINE = "openvino"
TRIAL_TOKENS = 8
"""Tokens that a compiled artifact has to decode before it is accepted."""


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare calibration text where these options look at it."""
    return {"calibration": Input(of="calibration")} if calibrated(options) else {}


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what optimum-intel can't export, or the target can't run; group widths are a matter of rules."""
    if ENGINE not in target.engines:
        message = f"target {target.name!r} doesn't run {ENGINE}"
        fix = f"it runs {', '.join(target.engines)}" if target.engines else "choose target: cpu"
        yield Problem(code="engine-not-on-target", message=message, fix=fix)
    known = architectures.known_to(ENGINE)
    if facts.model_type not in known:
        message = f"optimum-intel 2.2 isn't known to export model_type {facts.model_type!r}"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {', '.join(sorted(known))}")
        return
    yield from engines.unlike(ENGINE, facts)
    for name in ("awq", "scale_estimation"):
        if getattr(options, name) and options.weight_format != "int4":
            message = f"{name} fits int4 weights, and weight_format is {options.weight_format}"
            yield Problem(code="only-for-int4", message=message, fix="set weight_format: int4", loc=(name,))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from SmolLM2-135M: 36 s for floats, 45 s rounded; fitting runs the text through the model thrice."""
    fitted = 6e-11 * facts.parameters * calibration_tokens if calibrated(options) else 0
    held = 10 * facts.parameters
    written = after(options, facts).weight_bytes
    return Estimate(
        seconds=45 + facts.parameters / 1e7 + fitted, peak_bytes=650_000_000 + held, disk_bytes=written + 8_000_000
    )


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the IR; NNCF keeps the embedding and the head in int8 also where blocks are int4."""
    if options.weight_format == "float":
        return facts.having("openvino")
    table = facts.vocab * (facts.hidden + 3) * (1 if facts.tied else 2)
    if options.weight_format == "int8":
        size = facts.linear_elements + 3 * sum(rows for rows, _ in facts.linears.values())
    else:
        size = sum(_int4_bytes(shape, options, group(options, facts)) for shape in facts.linears.values())
    norms = 4 * (2 * facts.layers + 1) * facts.hidden
    return replace(facts.having("openvino", without=frozenset({"dense"})), weight_bytes=size + table + norms)


def _int4_bytes(shape: tuple[int, int], options: Options, size: int) -> int:
    rows, columns = shape
    groups = -(-columns // (size if size > 0 else columns))
    scales = rows * groups * (2 if options.sym else 2.5)
    small = rows * columns / 2 + scales
    return int(options.ratio * small + (1 - options.ratio) * rows * (columns + 3))


def run(options: Options, job: Job) -> Facts:
    """Export, round, decode; runs in the `openvino` environment.

    Raises:
        StageFailedError: The export failed, or what it wrote doesn't run on this processor.
        IntegrityError: What it wrote computes something else than the model.
    """
    from optikit.stages.compile import _openvino_build

    found = _openvino_build.export(options, job) | _openvino_build.compare(options, job)
    return {**found, "trial": json.loads(_openvino_build.decode(job, TRIAL_TOKENS))}
