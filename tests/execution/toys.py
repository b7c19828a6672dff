"""A job directory whose stage is a few lines of python written by the test, for the real worker."""

from __future__ import annotations

import json
from pathlib import Path

STAGE = """
from optikit.stage import ANY, StageOptions, no_objection, nothing
SUMMARY, NEEDS, WRITES, USES_TARGET, LIBRARIES = "", ANY, "{writes}", False, ("pydantic",)
ENVIRONMENT, inputs, fits = None, nothing, no_objection
class Options(StageOptions):
    bits: int = 4
def run(options, job):
    {body}
"""
HOOK = "import optikit.stages.quantize as q\nq.__path__.append({path!r})\n"
"""Python runs this when it starts, where PYTHONPATH leads to it: a stage beside ours."""


def write_job(
    place: Path,
    body: str,
    *,
    ranks: int = 1,
    directory: Path | None = None,
    writes: str = "measurement",
    source: Path | None = None,
) -> Path:
    """Write the stage `quantize: toy` and a job that asks for it; return the job's directory.

    Args:
        place: Has the stage and the hook; PYTHONPATH has to name it.
        body: Of the stage's `run(options, job)`, one statement a line, each but the first indented by four.
        ranks: Processes that share it.
        directory: Of the job; None is one in `place`.
        writes: What the stage says that it leaves.
        source: The model that it gets; None is `place`.
    """
    (place / "stages").mkdir(exist_ok=True)
    (place / "stages" / "toy.py").write_text(STAGE.format(body=body, writes=writes))
    (place / "sitecustomize.py").write_text(HOOK.format(path=str(place / "stages")))
    directory = directory or place / "job"
    directory.mkdir(exist_ok=True)
    request = {
        "verb": "quantize",
        "method": "toy",
        "options": {"bits": 3},
        "source": str(source or place),
        "dest": str(directory / "dest"),
        "scratch": str(directory / "scratch"),
        "inputs": {},
        "calibration": None,
        "seed": 0,
        "device": "cpu",
        "threads": 1,
        "max_memory_bytes": None,
        "ranks": ranks,
    }
    for name in ("dest", "scratch"):
        (directory / name).mkdir(exist_ok=True)
    (directory / "request.json").write_text(json.dumps(request))
    return directory
