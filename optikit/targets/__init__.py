"""Targets: where the artifact will run. Rows of `targets.toml`, plus what this machine really has."""

from __future__ import annotations

from optikit.targets.target import Device, Target, find, names, rows, unknown

__all__ = ["Device", "Target", "find", "names", "rows", "unknown"]
