"""The result behind `optikit serve` on this machine, under load: clients in closed loops, requests at random times.

Paper   goodput: Zhong et al. 2024, arXiv:2401.09670
Helps   what users of a server see, queue and network stack included, and how many of them it bears
Hurts   nothing but time
Cost    a start, and the requests of every load
Differs client and server share this machine's processors
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, Estimate, Facts, Job, no_objection
from optikit.stages.measure import _load, speed
from optikit.targets import Target

SUMMARY = "throughput, latency and goodput of the result behind `optikit serve`, by load"
NEEDS = ANY
WRITES = "measurement"
USES_TARGET = False
LIBRARIES = ("onnxruntime", "torch", "transformers", "tokenizers", "numpy", "uvicorn", "starlette")
ENVIRONMENT: str | None = None
inputs = _load.inputs
fits = no_objection
after = _load.after


class Options(_load.Options):
    """How much to ask, and of which runtime."""

    runtime: str = Field(default="onnxruntime", min_length=1)
    """Which one loads the result."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what is longer than the model's context."""
    yield from _load.check(options, facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate: a start, and the weights once for every token that is written."""
    return _load.estimate(options, facts, options.runtime)


def run(options: Options, job: Job) -> Facts:
    """Serve `job.source`, with what drafts if that is given, and load it.

    Raises:
        OptikitError: The server ended instead of answering.
        UnavailableError: It answers nothing.
        StageTimeoutError: It hangs.
    """
    from optikit.runtime.completions_client import Client
    from optikit.serving import started

    job.scratch.mkdir(parents=True, exist_ok=True)
    how = started.Serving(
        directory=job.source,
        batch=options.batch,
        queue=max(64, options.requests),
        speculator=_speculator(job),
        threads=job.threads,
    )
    with (
        started.serving(how, log=job.scratch / "serve.log", start_s=options.start_s) as (url, group),
        Client(url, timeout_s=options.hang_s) as client,
    ):
        return _load.loaded("optikit serve", client, options, job, group)


def _speculator(job: Job) -> Path | None:
    return speed.speculator(job, "speculator") if "speculator" in job.inputs else None
