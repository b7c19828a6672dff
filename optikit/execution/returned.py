"""Reads back what became of an emitted folder on the machine that it is for: `result.json`, and nothing else of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError
from optikit.fileio import file_sha256
from optikit.models.strict_json import read_object
from optikit.stage import EMITTED, RETURNED, VERIFIED, Facts, Job

if TYPE_CHECKING:
    from collections.abc import Mapping

RESULT = "result.json"
MANIFEST = "artifact.json"
MOST_BYTES = 1 << 20
FIX = "run the folder that this recipe wrote (run.sh) on the device, and copy its result.json back"
FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "job": str,
    "target": str,
    "machine": dict,
    "versions": dict,
    "seconds": (int, float),
    "decoded": str,
}
"""What a result has to say, and its types: `record` in the folder's check.py writes it."""


def read(_: Any, job: Job) -> Facts:
    """Keep the folder with its result in `job.dest`; return what the result says.

    Raises:
        IntegrityError: The result isn't one, or is another folder's.
    """
    emitted, path = job.inputs[EMITTED], job.inputs[RETURNED]
    found = _checked(path, emitted)
    shutil.copytree(emitted, job.dest, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    shutil.copyfile(path, job.dest / RESULT)
    machine = found["machine"]
    device = {"name": machine.get("name") or found["target"], "accelerators": machine.get("accelerators") or []}
    said = {"decoded": found["decoded"], "compile_seconds": found["seconds"], "versions": found["versions"]}
    return {VERIFIED: device, **said}


def _checked(path: Path, emitted: Path) -> dict[str, Any]:
    if path.stat().st_size > MOST_BYTES:
        raise IntegrityError(f"{path} has {path.stat().st_size} bytes: it isn't what check.py writes", fix=FIX)
    found = read_object(path)
    wrong = [name for name, kind in FIELDS.items() if not isinstance(found.get(name), kind)]
    if wrong or not found["decoded"].strip():
        raise IntegrityError(f"{path} doesn't say {', '.join(wrong) or 'what was decoded'}", fix=FIX)
    if found["job"] != file_sha256(emitted / "check.json"):
        message = f"{path} is of another folder: its job is {found['job'][:12]}, written for {found['target']}"
        raise IntegrityError(message, fix=FIX)
    return found
