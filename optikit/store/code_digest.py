"""Which code made a result: the digest of a module together with everything of optikit that it imports.

Part of every cache key, so that a changed algorithm never answers with yesterday's artifact, while a change to the
report or to the command line doesn't throw a night's work away.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

VOCABULARY = frozenset(
    {"optikit", "optikit.errors", "optikit.problems", "optikit.host", "optikit.models.facts", "optikit.stages"}
    | {
        "optikit.stage",
        "optikit.targets",
        "optikit.targets.target",
        "optikit.execution.worker",
        "optikit.evaluation.results",
    }
)
"""Modules that carry words and types between parts but compute nothing of a result."""


IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(optikit[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)|import[ \t]+(optikit[^\n#]*))",
    re.MULTILINE,
)
"""Far quicker than parsing every module, and the command line waits for it."""
COMMENT = re.compile(r"#[^\n]*")


def _path(module: str) -> Path | None:
    base = ROOT.parent.joinpath(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


@cache
def _imports(source: str) -> tuple[str, ...]:
    """Return what a source imports of optikit, at any depth; a line of prose that reads like an import counts too."""
    found: list[str] = []
    for module, names, modules in IMPORT.findall(source):
        if module:
            words = (name.split() for name in COMMENT.sub("", names).strip("()").split(","))
            found += [module, *(f"{module}.{word[0]}" for word in words if word)]
        found += [word.split()[0] for word in modules.split(",") if word.strip()]
    return tuple(found)


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
        waiting += _imports(path.read_text(encoding="utf-8"))
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
