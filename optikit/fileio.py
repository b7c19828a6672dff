"""The sha256 of a file: one way to say which bytes these are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    partial.replace(path)
