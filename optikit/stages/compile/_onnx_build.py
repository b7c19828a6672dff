"""onnxruntime-genai's model builder in a process of its own, and the trial of what it wrote in another one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optikit.process import child, program
from optikit.stages.compile import _onnx_norms
from optikit.stages.compile._onnx_verify import GRAPH

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts
    from optikit.stage import Job

BUILDER = "onnxruntime_genai.models.builder"
TRIAL = "optikit.stages.compile._onnx_trial"
LOG = "builder.log"
_LAYER = re.compile(r"Reading layer (\d+)")


def build(job: Job, precision: str, extra: Sequence[str], facts: ModelFacts, provider: str = "cpu") -> None:
    """Run the builder on `job.source`; the graph, its configuration and the tokenizer end up in `job.dest`.

    Args:
        job: Where to read, to write, and to keep the builder's cache and log.
        precision: What the builder calls precision.
        extra: Its `--extra_options`, KEY=VALUE.
        facts: Of the source.
        provider: Execution provider that will run the graph.

    Raises:
        OptikitError: It failed, crashed, or ran out of memory or disk; the message ends with its own last words.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    cache = job.scratch / "builder"
    shutil.rmtree(cache, ignore_errors=True)
    command = [*program.module(BUILDER), "-i", str(job.source.resolve()), "-o", str(job.dest.resolve())]
    command += ["-p", precision, "-e", provider, "-c", str(cache.resolve())]
    command += ["--extra_options", *extra, "hf_token=false", "hf_remote=false"]
    log = job.scratch / LOG
    lines = child.NewLines(log)

    def count_blocks() -> None:
        for line in lines.read():
            if found := _LAYER.match(line):
                job.progress(int(found[1]) + 1, facts.layers, "block")

    what, environ = "onnxruntime-genai's builder", program.environment(job)
    program.perform(what, command, log=log, environ=environ, directory=job.scratch, between=count_blocks)
    _onnx_norms.mend(job.source, job.dest / GRAPH, facts)


def decode(job: Job, tokens: int) -> str:
    """Let onnxruntime-genai decode from `job.dest`; see `program.trial`."""
    return program.trial("decoding with onnxruntime-genai", TRIAL, job, str(tokens))
