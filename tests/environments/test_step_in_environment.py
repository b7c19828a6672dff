"""A step in an interpreter of its own: the runner's and the worker's real code, in an environment made here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optikit import environments
from optikit import progress as showing
from optikit.environments import definition as definitions
from optikit.errors import OutOfMemoryError, StageFailedError, StageTimeoutError, UnavailableError
from optikit.execution import execute, supervise
from optikit.process import child
from optikit.store.store import Store
from tests.environments.wheelhouse import define, installed, wheel

STAGE = """
from optikit.stage import ANY, StageOptions, no_objection, nothing
SUMMARY, NEEDS, WRITES, USES_TARGET, LIBRARIES, ENVIRONMENT = "", ANY, "model", False, ("alpha",), "tiny"
inputs, fits = nothing, no_objection
class Options(StageOptions):
    bits: int = 4
def run(options, job):
    {body}
"""
NEEDED = ("pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection", "packaging")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's home with one environment, in which `quantize: {method: foreign}` is a file beside it."""
    base = tmp_path_factory.mktemp("environment")
    wheels = base / "wheels"
    wheels.mkdir()
    hook = f"import optikit.stages.quantize as q\nq.__path__.append({str(base / 'stages')!r})\n"
    made = [wheel(wheels, "alpha", "1.5"), wheel(wheels, "sitecustomize", code=hook)]
    define(base, [*made, *(installed(wheels, name) for name in NEEDED)])
    environments.ensure("tiny", Store(base / "home"), root=base, wheels=wheels)
    return base


@pytest.fixture
def step(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(definitions, "ROOT", home)

    def do(body: str, timeout: float | None = None) -> dict[str, Any]:
        (home / "stages").mkdir(exist_ok=True)
        (home / "stages" / "foreign.py").write_text(STAGE.format(body=body))
        request = {
            "verb": "quantize",
            "method": "foreign",
            "options": {"bits": 4},
            "source": str(tmp_path),
            "dest": str(tmp_path / "dest"),
            "scratch": str(tmp_path),
            "inputs": {},
            "calibration": None,
            "seed": 0,
            "device": "cpu",
            "threads": 1,
            "max_memory_bytes": None,
            "ranks": 1,
        }
        (tmp_path / "request.json").write_text(json.dumps(request))
        what: Any = SimpleNamespace(name="1-quantize-foreign", environment="tiny")
        store, progress = Store(home / "home"), showing.make("none")
        plan: Any = SimpleNamespace(recipe=SimpleNamespace(timeout=timeout))
        executor = execute._Executor(plan, store, progress, execute.Settings(offline=True))
        with executor._environment(what, lambda *_: None) as used:
            return supervise.respond(what.name, tmp_path, timeout=timeout, observe=lambda *_: None, environment=used)

    return do


def test_its_answer_comes_back_with_the_versions_of_its_libraries(step, home) -> None:
    response = step("import sys; return {'python': sys.prefix, 'secret': __import__('os').environ.get('A_TOKEN')}")
    assert response["ok"], response
    assert response["facts"]["python"].startswith(str(home / "home" / "environments" / "tiny-"))
    assert response["facts"]["secret"] is None
    assert response["versions"] == {"alpha": "1.5"}
    assert response["peak_memory_mib"] > 1


def test_a_native_crash_is_named(step) -> None:
    with pytest.raises(StageFailedError, match="crashed with SIGSEGV"):
        step("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")


def test_a_hang_ends_at_the_timeout(step) -> None:
    with pytest.raises(StageTimeoutError, match="longer than 5 s"):
        step("import time; time.sleep(600)", timeout=5)


def test_what_is_not_there_is_an_error_of_the_stage(step) -> None:
    response = step("import torch")
    assert not response["ok"]
    assert "No module named 'torch'" in response["message"]


def test_an_environment_removed_while_it_is_used_is_why_the_step_failed(step, home, tmp_path) -> None:
    kept = tmp_path / "kept"
    path = next((home / "home" / "environments").glob("tiny-*/"))
    shutil.copytree(path, kept, symlinks=True)
    try:
        with pytest.raises(UnavailableError, match="removed it while it was used"):
            step("import shutil, sys; shutil.rmtree(sys.prefix); import alpha")
    finally:
        shutil.rmtree(path, ignore_errors=True)
        kept.rename(path)


def test_a_log_that_would_fill_the_disk_is_cut(step, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(child, "MOST_LOG_BYTES", 2**20)
    said = "import os, time\n    for _ in range(200): os.write(1, b'x' * 2**20); time.sleep(0.005)\n    return {}"
    assert step(said)["ok"]
    kept = (tmp_path / "log.txt").stat().st_size
    assert kept < 100 * 2**20
    assert b"were cut off" in (tmp_path / "log.txt").read_bytes()[:100]


def test_a_crash_after_much_output_is_still_named(step) -> None:
    with pytest.raises(OutOfMemoryError):
        step(
            "import os\n    for _ in range(20): os.write(1, b'x' * 2**20)\n    os.write(1, b'MemoryError'); os._exit(1)"
        )
