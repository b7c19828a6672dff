"""The command line as a user meets it: real child processes, a store of its own, a tiny real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml


@dataclass(frozen=True)
class Cli:
    """Runs optikit with a store of its own."""

    home: Path
    cwd: Path

    def environment(self, **extra: str) -> dict[str, str]:
        return os.environ | {"OPTIKIT_HOME": str(self.home), "NO_COLOR": "1", "COLUMNS": "100"} | extra

    def __call__(self, *arguments: str | Path, env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "optikit", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.cwd, env=self.environment(**env), timeout=300
        )

    def start(self, *arguments: str | Path, env: Mapping[str, str] = {}) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "optikit", *map(str, arguments)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.cwd,
            env=self.environment(**env),
        )

    def temporary(self) -> list[Path]:
        """Return whatever a run left half-made in the store."""
        return list((self.home / "tmp").iterdir())


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(home=tmp_path / "home", cwd=tmp_path)


Recipe = dict[str, Any]


@pytest.fixture(scope="session")
def base_recipe(taught_llama: Path, prose: Path) -> Recipe:
    """A whole small recipe: quantize, compile, measure, gate."""
    return {
        "model": str(taught_llama),
        "calibration": {"text": str(prose), "part": [0.0, 0.7], "samples": 4, "length": 32},
        "stages": [
            {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}},
            {"compile": {"engine": "onnxruntime"}},
        ],
        "evaluate": {
            "perplexity": {"text": str(prose), "part": [0.7, 1.0], "window": 32, "windows": 4},
            "speed": {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 2, "warmup": 1},
        },
        "gates": {"perplexity_ratio": {"max": 2.0}},
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[Recipe], Path]:
    def write(recipe: Recipe) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return write


@dataclass(frozen=True)
class Finished:
    """A whole run that ended well, made once for all tests that only look at it."""

    cli: Cli
    recipe: Path
    out: Path
    process: subprocess.CompletedProcess[str]

    @property
    def report(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.out / "report.json").read_text(encoding="utf-8"))
        return loaded


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, base_recipe: Recipe) -> Finished:
    root = tmp_path_factory.mktemp("finished")
    recipe = root / "recipe.yaml"
    recipe.write_text(
        "# a comment that must survive\n" + yaml.safe_dump(base_recipe, sort_keys=False), encoding="utf-8"
    )
    cli = Cli(home=root / "home", cwd=root)
    process = cli("run", recipe, "--out", root / "out")
    assert process.returncode == 0, process.stderr
    return Finished(cli, recipe, root / "out", process)
