"""`serve:` of a recipe, run: the folders are there, sealed, and what they start answers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from tests.e2e.conftest import Finished


@pytest.fixture(scope="module")
def bundled(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundled")
    recipe = yaml.safe_load(finished.recipe.read_text(encoding="utf-8"))
    recipe["serve"] = ["optikit", {"server": "onnxruntime-genai", "name": "tiny"}]
    path = place / "My recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    process = finished.cli("run", path, "--out", place / "out")
    assert process.returncode == 0, process.stderr
    return place / "out"


def test_folders_are_part_of_the_sealed_output(finished: Finished, bundled: Path) -> None:
    names = set(json.loads((bundled / "artifact.json").read_text())["files"])
    assert {"serve/optikit/compose.yaml", "serve/optikit/README.md", "serve/onnxruntime-genai/generate.py"} <= names
    assert finished.cli("verify", bundled).returncode == 0
    assert "my-recipe" in yaml.safe_load((bundled / "serve/optikit/compose.yaml").read_text())["services"]


def test_the_program_for_onnxruntime_genai_answers(bundled: Path) -> None:
    program = bundled / "serve/onnxruntime-genai/generate.py"
    process = subprocess.run([sys.executable, str(program), "--check"], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr  # it is 1 where no token came


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.skipif(shutil.which("curl") is None, reason="check.sh asks with curl")
def test_what_the_image_starts_passes_its_own_check(finished: Finished, bundled: Path) -> None:
    pytest.importorskip("uvicorn")
    text = (bundled / "serve/optikit/Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    words = [str(bundled) if word == "/out" else word for word in json.loads(command)]
    port = free_port()
    words[words.index("--port") + 1] = str(port)
    words[words.index("--host") + 1] = "127.0.0.1"
    server = finished.cli.start(*words)
    try:
        check = ["sh", str(bundled / "serve/optikit/check.sh"), f"http://127.0.0.1:{port}", "60"]
        process = subprocess.run(check, capture_output=True, text=True, check=False, env=os.environ)
    finally:
        server.terminate()
        _, errors = server.communicate(timeout=60)
    assert process.returncode == 0, (shlex.join(words), process.stderr, errors)
    assert json.loads(process.stdout)["usage"]["completion_tokens"] == 8


def test_a_check_ends_where_nobody_listens(bundled: Path) -> None:
    check = ["sh", str(bundled / "serve/optikit/check.sh"), f"http://127.0.0.1:{free_port()}", "1"]
    process = subprocess.run(check, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "doesn't answer" in process.stderr
