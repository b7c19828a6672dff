"""`optikit run --resume`: what was emitted for another machine is finished where its tools turn up.

The compiler can't be had here, so a script of its name stands where it would: it gets the arguments that the emitted
folder passes, and leaves files as it would. Everything around it is real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from optikit.stages.compile import (
    _finish,
    _neuron_options,
    _tensorrt_options,
    _trtllm_options,
    neuron,
    tensorrt,
    tensorrt_llm,
)

EXPORT = """#!/bin/sh
for out; do :; done            # the last argument
mkdir -p "$out"
cp model/config.json "$out"
test -f model/model.safetensors || exit 3
echo "$@" > "$out/arguments"
"""
FAILS = "#!/bin/sh\necho 'error: no such instance family'\nexit 7\n"


@pytest.fixture
def optikit(tiny_llama, tmp_path):
    """Run the recipe, with some tools in front of PATH; returns the report and what was said."""
    recipe = {
        "model": str(tiny_llama),
        "target": "inf2.xlarge",
        "stages": [{"compile": {"engine": "neuron", "sequence_length": 256}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    tools = tmp_path / "tools"
    tools.mkdir()

    def run(*arguments, expected=0, **scripts):
        for name, text in scripts.items():
            path = tools / name.replace("_", "-")
            path.write_text(text)
            path.chmod(0o755)
        command = [sys.executable, "-m", "optikit", "run", "recipe.yaml", "--out", "out", "--progress", "plain"]
        variables = {**os.environ, "OPTIKIT_HOME": str(tmp_path / "home")}
        variables["PATH"] = os.pathsep.join([str(tools), str(Path(sys.executable).parent), "/usr/bin:/bin"])
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == expected, done.stderr
        (step,) = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
        return step, done.stderr

    return run


def test_emitted_here_finished_there_and_kept(optikit, tmp_path):
    step, said = optikit("--resume")
    assert step["status"] == "emitted"
    assert "stays emitted: optimum-cli and neuronx-cc can't be found on PATH" in said
    step, _ = optikit(optimum_cli=EXPORT, neuronx_cc="#!/bin/sh\n")
    assert step["status"] == "emitted"  # it wasn't asked for
    step, _ = optikit("--resume")
    assert step["status"] == "executed"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["result"]["size_bytes"] == report["baseline"]["size_bytes"] > 0  # of the weights that it loads
    made = tmp_path / "out" / "compiled" / "neuron" / step["facts"]["compiled"]
    assert "--sequence_length 256" in (made / "arguments").read_text()
    assert json.loads((made / "result.json").read_text())["key"] == step["facts"]["key"]
    assert (made.parent / "compile.sh").is_file()
    assert not (made.parent / "model" / "model.safetensors").exists()  # it lies in out/model
    step, _ = optikit()
    assert step["status"] == "cached"


def test_a_compiler_that_fails_is_quoted_and_what_was_emitted_stays(optikit):
    optikit()
    step, said = optikit("--resume", expected=70, optimum_cli=FAILS, neuronx_cc="#!/bin/sh\n")
    assert "no such instance family" in said
    assert step["status"] == "emitted"  # the report of the run before


def test_what_is_lacking_is_said():
    assert neuron.absent(_neuron_options.Options(backend="vllm-neuron")).startswith("vLLM compiles when")
    assert _finish.lacking(("sh", "no-such-tool")) == "no-such-tool can't be found on PATH"
    if not _finish.GPU.exists():
        assert tensorrt.absent(_tensorrt_options.Options()) == "there is no NVIDIA GPU here"
        assert tensorrt_llm.absent(_trtllm_options.Options()) == "there is no NVIDIA GPU here"
