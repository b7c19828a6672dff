"""Nothing outside optikit/process starts, signals or ties a process: read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import optikit

ROOT = Path(optikit.__file__).parent
MODULES = ("subprocess", "multiprocessing", "pty")
EMITTED = ("_folder_check.py",)
"""Written into folders for other machines, where it runs alone."""
OF_OS = ("kill", "killpg", "fork", "forkpty", "system", "popen", "posix_spawn", "posix_spawnp", "setsid", "setpgid")
PREFIXES_OF_OS = ("exec", "spawn")


def offences(source: str) -> Iterator[str]:
    """Yield what a source imports or calls that only optikit/process may, as `line: name`."""
    for node in ast.walk(ast.parse(source)):
        for name in _names(node):
            if _forbidden(name):
                yield f"{node.lineno}: {name}"


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Attribute):
        return [f"os.{node.attr}" if isinstance(node.value, ast.Name) and node.value.id == "os" else f".{node.attr}"]
    return []


def _forbidden(name: str) -> bool:
    first, _, last = name.rpartition(".")
    if name.partition(".")[0] in MODULES or last in ("prctl", "create_subprocess_exec", "create_subprocess_shell"):
        return True
    return first == "os" and (last in OF_OS or last.startswith(PREFIXES_OF_OS))


def test_no_other_module_starts_or_signals_a_process() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{each}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.parent != ROOT / "process" and path.name not in EMITTED
        for each in offences(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "def f():\n    from subprocess import run",
        "import os\nos.kill(1, 9)",
        "import os\nos.killpg(1, 9)",
        "from os import killpg",
        "import os\nos.execvp('a', [])",
        "import ctypes\nctypes.CDLL(None).prctl(1, 9)",
        "import multiprocessing.pool",
        "import asyncio\nasyncio.create_subprocess_exec('a')",
    ],
)
def test_it_would_be_found(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize("source", ["import os\nos.path.exists('a')", "import signal\nsignal.raise_signal(9)", "run()"])
def test_other_code_is_left_alone(source: str) -> None:
    assert not list(offences(source))
