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
    {
        "optikit",
        "optikit.described",
        "optikit.errors",
        "optikit.problems",
        "optikit.host",
        "optikit.models.facts",
        "optikit.stages",
    }
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


def _source(module: str) -> bytes | None:
    """Return what a module's file holds; None where there is no such module, as of a name that isn't one."""
    base = f"{ROOT.parent}/{module.replace('.', '/')}"
    for path in (f"{base}.py", f"{base}/__init__.py"):
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - pathlib takes longer than the file
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            continue
    return None


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
    return tuple(sorted(_reached(module)))


def _reached(module: str) -> dict[str, bytes]:
    """Return the sources of a module and of all that it reaches, by name."""
    found: dict[str, bytes] = {}
    seen = set(VOCABULARY)
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or not name.startswith("optikit."):
            continue
        seen.add(name)
        source = _source(name)
        if source is not None:
            found[name] = source
            waiting += _imports(source.decode())
    return found


@cache
def source_digest(module: str) -> str:
    """Return the sha256 of the source of a module's closure."""
    digest = hashlib.sha256()
    for name, source in sorted(_reached(module).items()):
        digest.update(name.encode() + b"\0" + source + b"\0")
    return digest.hexdigest()
