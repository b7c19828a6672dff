"""onnxruntime-genai's model builder in a process of its own, and the trial of what it wrote in another one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, cast

from optikit.errors import OutOfMemoryError, StageFailedError

if TYPE_CHECKING:
    from pathlib import Path

    from optikit.stages.protocol import Job

BUILDER = "onnxruntime_genai.models.builder"
TRIAL = "optikit.stages.compile._onnx_trial"
CHILD = "optikit.stages.compile._onnx_child"
LOG = "builder.log"
LOG_TAIL = 12
"""Lines of a child's log that an error message quotes."""
_LAYER = re.compile(r"Reading layer (\d+)")


def environment(job: Job) -> dict[str, str]:
    """Return the environment of a child: no hub, no remote cache, this many threads."""
    caches = {"HF_HOME": str(job.scratch / "hf"), "XDG_CACHE_HOME": str(job.scratch / "cache")}
    threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **offline, **caches, **threads}


def program(module: str) -> list[str]:
    """Return the command that runs a module in a child that dies with this process.

    -P: nothing in the working directory is imported by accident.
    """
    return [sys.executable, "-P", "-m", CHILD, str(os.getpid()), module]


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
    """Let onnxruntime-genai decode from `job.dest` in a process of its own, where a crash harms nobody.

    Returns:
        What the child printed: one line of JSON.

    Raises:
        StageFailedError: It crashed or refused.
    """
    log = job.scratch / "trial.log"
    command = [*program(TRIAL), str(job.dest.resolve()), str(tokens)]
    with log.open("w", encoding="utf-8") as kept:
        child = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=kept, text=True, env=environment(job), cwd=job.scratch, check=False
        )
    require_success("decoding with onnxruntime-genai", child.returncode, log)
    return child.stdout


def require_success(what: str, code: int, log: Path) -> None:
    """Turn a child's exit code into an error that quotes its log.

    Raises:
        StageFailedError: If it isn't zero.
        OutOfMemoryError: If the kernel killed it.
    """
    if code == 0:
        return
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    tail = "\n".join(lines[-LOG_TAIL:])
    if code == -9 or "MemoryError" in tail or "std::bad_alloc" in tail:
        raise OutOfMemoryError(f"{what} ran out of memory", fix="give the run more memory, or a smaller model")
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    raise StageFailedError(f"{what} {how}; its log ends:\n{tail}", fix=f"the whole log is {log}")
