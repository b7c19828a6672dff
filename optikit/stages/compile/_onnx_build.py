"""onnxruntime-genai's model builder in a process of its own, and the trial of what it wrote in another one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, cast

from optikit.process.program import environment, program, require_success, trial

if TYPE_CHECKING:
    from optikit.stage import Job

BUILDER = "onnxruntime_genai.models.builder"
TRIAL = "optikit.stages.compile._onnx_trial"
LOG = "builder.log"
_LAYER = re.compile(r"Reading layer (\d+)")


def build(job: Job, precision: str, extra: Sequence[str], layers: int, provider: str = "cpu") -> None:
    """Run the builder on `job.source`; the graph, its configuration and the tokenizer end up in `job.dest`.

    Args:
        job: Where to read, to write, and to keep the builder's cache and log.
        precision: What the builder calls precision.
        extra: Its `--extra_options`, KEY=VALUE.
        layers: Decoder blocks of the model, for progress.
        provider: Execution provider that will run the graph.

    Raises:
        StageFailedError: It failed; the message ends with its own last words.
        OutOfMemoryError: It was killed.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    cache = job.scratch / "builder"
    shutil.rmtree(cache, ignore_errors=True)
    command = [*program(BUILDER), "-i", str(job.source.resolve()), "-o", str(job.dest.resolve())]
    command += ["-p", precision, "-e", provider, "-c", str(cache.resolve())]
    command += ["--extra_options", *extra, "hf_token=false", "hf_remote=false"]
    log = job.scratch / LOG
    with log.open("w", encoding="utf-8") as kept:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(job), cwd=job.scratch
        )
        with child:
            for line in cast("IO[str]", child.stdout):
                kept.write(line)
                if found := _LAYER.match(line):
                    job.progress(int(found[1]) + 1, layers, "block")
    require_success("onnxruntime-genai's builder", child.returncode, log)


def decode(job: Job, tokens: int) -> str:
    """Let onnxruntime-genai decode from `job.dest`; see `_child.trial`."""
    return trial("decoding with onnxruntime-genai", TRIAL, job, str(tokens))
