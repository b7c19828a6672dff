"""Which code made a result: the digest of a module together with everything of optikit that it imports.

Part of every cache key, so that a changed algorithm never answers with yesterday's artifact, while a change to the
report or to the command line doesn't throw a night's work away.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent

VOCABULARY = frozenset(
    {"optikit", "optikit.errors", "optikit.problems", "optikit.host", "optikit.models.facts", "optikit.stages"}
    | {
        "optikit.stages.protocol",
        "optikit.targets",
        "optikit.targets.target",
        "optikit.worker",
        "optikit.report.schema",
    }
)
"""Modules that carry words and types between parts but compute nothing of a result."""


def _path(module: str) -> Path | None:
    base = ROOT.parent.joinpath(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def closure(module: str) -> tuple[str, ...]:
    """Return a module and all modules of optikit that it reaches by imports, sorted."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _path(name) if name.startswith("optikit.") else None
        if path is None or name in found or name in VOCABULARY:
            continue
        found.add(name)
        waiting += _imports(path)
    return tuple(sorted(found))


@cache
def source_digest(module: str) -> str:
    """Return the sha256 of the source of a module's closure."""
    digest = hashlib.sha256()
    for name in closure(module):
        path = _path(name)
        if path is not None:
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
