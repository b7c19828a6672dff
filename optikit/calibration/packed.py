"""The end of a weight-only quantization: the model directory, written and held to its promise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optikit.algorithms.grid import Grid
from optikit.calibration.verify import verify_packed
from optikit.calibration.walk import Walked
from optikit.formats.directory import write_model
from optikit.stages.protocol import Job


def write_packed(job: Job, walked: Walked, grid: Grid, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
    """Write `job.dest` as a `gptq` checkpoint and verify it against `job.source`.

    Returns:
        Facts about what was written.

    Raises:
        StageFailedError: What was written isn't what was promised.
    """
    write_model(job.source, job.dest, walked.entries, changes={"quantization_config": dict(quantization_config)})
    return verify_packed(job.source, job.dest, walked.linears, grid)
