"""The result as vLLM serves it on this machine, under load: as `serving`, with vLLM in place of `optikit serve`.

Paper   as `serving`
Hurts   memory: vLLM keeps keys and values of all texts at once
Cost    a start of vLLM, and the requests of every load
Differs nothing but the server
"""

from __future__ import annotations

from collections.abc import Iterator

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import Estimate, Facts, Job, no_objection
from optikit.stages.measure import _load, served
from optikit.targets import Target

SUMMARY = "throughput, latency and goodput of the result as vLLM serves it, by load"
NEEDS = served.NEEDS
WRITES = "measurement"
USES_TARGET = False
LIBRARIES = served.LIBRARIES
ENVIRONMENT = served.ENVIRONMENT
inputs = _load.inputs
fits = no_objection
after = _load.after
Options = _load.Options


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what is longer than the model's context; what vLLM doesn't load is told of `served`."""
    yield from _load.check(options, facts)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate: a start, and the weights once for every token that is written."""
    return _load.estimate(options, facts, "vllm")


def run(options: Options, job: Job) -> Facts:
    """Serve `job.source` with vLLM, drafting as `speculator` says where that is given, and load it.

    Raises:
        StageFailedError: vLLM doesn't load the directory: its words are quoted.
        StageTimeoutError: It doesn't answer in time.
        UnavailableError: It answers nothing.
    """
    from optikit.models.reader import read
    from optikit.runtime import vllm_server
    from optikit.runtime.completions_client import Client

    facts = read(job.source)
    job.scratch.mkdir(parents=True, exist_ok=True)
    how = vllm_server.Serving(
        directory=job.source,
        max_tokens=facts.max_positions,
        requests=options.batch,
        threads=job.threads,
        cache_gib=vllm_server.cache_gib(facts, max(facts.max_positions, options.batch * _most(options))),
        device=job.device,
        speculation=vllm_server.speculation(job.inputs["speculator"]) if "speculator" in job.inputs else None,
    )
    with (
        vllm_server.serving(how, log=job.scratch / served.LOG, start_s=options.start_s) as (url, group),
        Client(url, timeout_s=options.hang_s) as client,
    ):
        return _load.loaded("vLLM", client, options, job, group)


def _most(options: Options) -> int:
    return options.prompt_tokens + options.new_tokens
