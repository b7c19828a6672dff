"""What tests of trainings share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from optikit import stages
from optikit.stage import Calibration, Job

LENGTH = 64


def perform(verb: str, method: str, source: Path, place: Path, prose: Path, **given: Any) -> dict[str, Any]:
    """Run a stage on `source` into `place`/model."""
    changes = {key: given.pop(key) for key in ("progress", "teacher") if key in given}
    for name in ("model", "scratch"):
        (place / name).mkdir(parents=True, exist_ok=True)
    stage = stages.load(verb, method)
    job = Job(
        source=source,
        dest=place / "model",
        scratch=place / "scratch",
        inputs={"teacher": changes.pop("teacher", source)},
        calibration=Calibration(text=prose, samples=6, length=given.pop("length", LENGTH)),
        **changes,
    )
    return stage.run(stage.Options(**given), job)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in a stage catches it."""
