"""`optikit env` on a machine that has built nothing yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from optikit import environments


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optikit", "env", *arguments]
    return subprocess.run(
        command, env=os.environ | {"OPTIKIT_HOME": str(home)}, capture_output=True, text=True, check=False
    )


def test_what_is_not_built_is_said_and_is_no_failure(tmp_path: Path) -> None:
    done = run(tmp_path, "check")
    assert done.returncode == 0
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == list(environments.names())
    assert all("not built" in line for line in done.stdout.splitlines())
    assert json.loads(run(tmp_path, "check", "autoawq", "--json").stdout) == {}


def test_a_name_that_is_not_known_is_answered_with_the_nearest(tmp_path: Path) -> None:
    done = run(tmp_path, "check", "gptq-model")
    assert done.returncode == 2
    assert "gptqmodel" in done.stderr
