"""Outputs for tests: a directory laid out as `optikit run` leaves it, sealed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optikit.fileio import file_sha256
from optikit.store import files, manifest

SAID: dict[str, Any] = {"optikit": "0.0.1", "key": "0" * 64, "steps": [], "target": "cpu", "traits": []}
CONTENT = {
    "model/config.json": "{}",
    "model/model.safetensors": "weights",
    "compiled/onnxruntime/model.onnx": "graph",
    "compiled/onnxruntime/genai_config.json": "{}",
    "recipe.yaml": "model: m\nstages: []\n",
    "optikit.lock": "{}",
    "report.json": '{"verdict": "pass"}',
    "report.md": "pass",
    "report.html": "<p>pass</p>",
}


def fill(directory: Path) -> None:
    for name, content in CONTENT.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


def seal_output(directory: Path, *, version: int = 2, **said: Any) -> None:
    """Write artifact.json over everything that lies there; version 1 leaves reports, recipe and lock out."""
    names = [name for name in files.walk(directory) if name != manifest.NAME and (version > 1 or "/" in name)]
    records = {
        name: {"size": (directory / name).stat().st_size, "sha256": file_sha256(directory / name)} for name in names
    }
    text = manifest.dumps({**SAID, **said, "schema_version": version, "files": records})
    (directory / manifest.NAME).write_text(text)
