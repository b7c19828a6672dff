"""Emitted folders on the machine that gets them: the check, an interruption, the result, and its way back.

Compilers and devices can't be had here. A script of the compiler's name stands where it would; the rest is real.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from optikit.stage import Job
from optikit.stages.compile import _folder, _speculators, neuron, tensorrt_llm
from optikit.stages.compile._neuron_options import Options
from optikit.stages.compile._trtllm_options import Options as TrtllmOptions
from tests.stages.compile.conftest import target_row

SAID = "decoded 8 tokens: 'The capital of France is Paris'\n"


def run(command, cwd, **environment):
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def check(folder, *verb):
    return run([sys.executable, "check.py", *verb], folder)


@pytest.fixture(scope="module", params=["neuron", "tensorrt-llm"])
def folder(request, tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    dest = out / "compiled" / request.param
    dest.mkdir(parents=True)
    shutil.copytree(tiny_llama, out / "model")
    stage, options = (
        (neuron, Options(sequence_length=512))
        if request.param == "neuron"
        else (tensorrt_llm, TrtllmOptions(sequence_length=512))
    )
    target = target_row("inf2.xlarge" if request.param == "neuron" else "l4")
    stage.run(options, Job(source=tiny_llama, dest=dest, scratch=out, target=target))
    return dest


class TestCheck:
    def test_what_is_missing_here_is_told_each_with_what_to_do(self, folder):
        code, said = check(folder)
        assert code == 69
        lines = said.splitlines()
        assert all(line.startswith("check: ") for line in lines)
        assert any(": this folder is for " in line for line in lines)  # no such device is here
        assert any("pip install" in line for line in lines) == (folder.name == "neuron")

    def test_a_changed_or_missing_file_is_found(self, folder, tmp_path):
        copy = tmp_path / "out" / "compiled" / "x"
        shutil.copytree(folder, copy)
        with (copy / "run.sh").open("a") as file:
            file.write("# mine\n")
        (copy / "model" / "config.json").unlink()
        code, said = check(copy)
        assert (code, "run.sh was changed" in said, "model/config.json is missing" in said) == (76, True, True)

    def test_the_model_is_held_to_the_seal_of_the_output(self, folder, tmp_path):
        out = tmp_path / "out"
        shutil.copytree(folder.parents[1], out)
        digest = "0" * 64
        (out / "artifact.json").write_text(json.dumps({"files": {"model/model.safetensors": {"sha256": digest}}}))
        code, said = check(out / "compiled" / folder.name)
        assert (code, "model/model.safetensors isn't the file" in said) == (76, True)

    def test_a_result_needs_a_decoded_text_and_names_job_machine_and_versions(self, folder, tmp_path):
        copy = tmp_path / "x"
        shutil.copytree(folder, copy)
        assert check(copy, "record")[0] == 69
        (copy / "smoke.log").write_text(SAID)
        assert check(copy, "record", "12")[0] == 0
        found = json.loads((copy / "result.json").read_text())
        assert (found["decoded"], found["seconds"]) == (SAID.strip(), 12.0)
        assert found["versions"]["torch"]
        assert not (copy / "result.json.part").exists()

    def test_a_python_that_the_libraries_have_no_wheels_for_is_found_before_they_are_installed(self, folder, tmp_path):
        copy = tmp_path / "x"
        shutil.copytree(folder, copy)
        assert check(copy, "python") == (0, "")
        wants = json.loads((copy / "check.json").read_text()) | {"python": [[3, 4], [3, 5]]}
        (copy / "check.json").write_text(json.dumps(wants))
        code, said = check(copy, "python")
        assert (code, "not 3.4 to 3.4: use another python3" in said) == (69, True)

    def test_a_machine_without_the_device_is_refused_before_anything_is_installed(self, folder, tmp_path):
        copy = tmp_path / "x"
        shutil.copytree(folder, copy)
        code, said = check(copy, "before")
        assert (code, ": this folder is for " in said, "pip install" in said) == (69, True, False)
        if folder.name == "neuron":
            code, said = run(["sh", "run.sh"], copy)
            assert (code, ": this folder is for " in said, (copy / "env").exists()) == (69, True, False)

    def test_either_of_two_packages_will_do(self, folder, tmp_path):
        copy = tmp_path / "x"
        shutil.copytree(folder, copy)
        wants = json.loads((copy / "check.json").read_text())
        (copy / "check.json").write_text(json.dumps(wants | {"packages": {"no-such-package|pytest": ".*"}}))
        assert check(copy, "packages") == (0, "")
        (copy / "check.json").write_text(json.dumps(wants | {"packages": {"no-such-package|nor-this": ".*"}}))
        assert check(copy, "packages")[0] == 69


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_no_server_behind(tmp_path, stop):
    script = f"#!/bin/sh\nset -eu\n{sys.executable} server.py &\n{_folder.SERVED}"
    (tmp_path / "run.sh").write_text(script)
    (tmp_path / "smoke.sh").write_text(_folder.smoke(1, 10))  # nobody answers at port 1
    (tmp_path / "server.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        ["sh", "run.sh"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        server = int(started.stdout.readline())
        while not (tmp_path / "smoke.log").exists():
            time.sleep(0.01)
        os.killpg(started.pid, stop) if stop == signal.SIGINT else started.send_signal(stop)
        assert started.wait(timeout=120) == 128 + stop
    for _ in range(3000):
        if not Path(f"/proc/{server}/cmdline").exists() or not Path(f"/proc/{server}/cmdline").read_text():
            return
        time.sleep(0.01)
    os.kill(server, signal.SIGKILL)
    pytest.fail("the server runs on")


EXPORT = """#!/bin/sh
for out; do :; done            # the last argument
mkdir -p "$out"
cp model/config.json "$out"
echo "$NEURON_RT_VISIBLE_CORES" > "$out/cores"
[ ! -f ../fail ] || exit 9
"""


def test_an_interrupted_compilation_begins_again_and_a_finished_one_stays(tiny_llama, tmp_path):
    out = tmp_path / "out"
    dest = out / "compiled" / "neuron"
    dest.mkdir(parents=True)
    shutil.copytree(tiny_llama, out / "model")
    options = Options(sequence_length=512, tensor_parallel=2, first_core=4)
    neuron.run(options, Job(source=tiny_llama, dest=dest, scratch=out, target=target_row("inf2.48xlarge")))
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "optimum-cli").write_text(EXPORT)
    (tools / "optimum-cli").chmod(0o755)
    path = os.pathsep.join([str(tools), os.path.dirname(sys.executable), os.environ["PATH"]])  # noqa: PTH120 - as a shell sees it
    (dest.parent / "fail").touch()
    assert run(["sh", "compile.sh"], dest, PATH=path)[0] == 9
    (made,) = dest.glob("compiled-*")
    assert not (made / "result.json").exists()
    (made / "left").touch()
    (dest.parent / "fail").unlink()
    code, said = run(["sh", "compile.sh"], dest, PATH=path)
    assert (code, said.splitlines()[-1]) == (0, made.name)
    assert not (made / "left").exists()
    assert (made / "cores").read_text() == "4-5\n"
    (tools / "optimum-cli").write_text("#!/bin/sh\nexit 9\n")
    assert run(["sh", "compile.sh"], dest, PATH=path)[0] == 0
    (dest / "env" / "bin").mkdir(parents=True)  # what run.sh has installed is used from another shell, too
    (dest / "env" / "bin" / "activate").write_text(f"PATH={tmp_path / 'installed'}:$PATH")
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "optimum-cli").write_text('#!/bin/sh\necho "installed $*"\n')
    (tmp_path / "installed" / "optimum-cli").chmod(0o755)
    code, said = run(["sh", "serve.sh"], dest, PATH=path)
    assert (code, said.startswith(f"installed neuron serve --model {made.name}")) == (0, True)


@pytest.fixture
def optikit(tiny_llama, tmp_path):
    stages = [{"compile": {"engine": "neuron", "sequence_length": 256}}]
    recipe = {"model": str(tiny_llama), "target": "inf2.xlarge", "stages": stages}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    def command(*arguments):
        line = [
            sys.executable,
            "-m",
            "optikit",
            "run",
            "recipe.yaml",
            "--out",
            "out",
            "--progress",
            "plain",
            *arguments,
        ]
        return run(line, tmp_path, OPTIKIT_HOME=str(tmp_path / "home"))

    return command


def test_a_result_that_comes_back_is_read_into_the_report(optikit, tmp_path):
    assert optikit()[0] == 0
    folder, report = tmp_path / "out" / "compiled" / "neuron", tmp_path / "out" / "report.json"
    device = tmp_path / "device"
    shutil.copytree(folder, device)
    (device / "smoke.log").write_text(SAID)
    assert check(device, "record", "312")[0] == 0
    shutil.copy(device / "result.json", folder)

    code, said = optikit()
    assert (code, "run with --resume" in said) == (73, True)  # it isn't thrown away unread
    code, said = optikit("--resume")
    assert code == 0, said
    told = json.loads(report.read_text())
    (step,) = told["steps"]
    assert step["status"] == "verified"
    assert step["facts"]["compile_seconds"] == 312
    assert any("came back verified" in line and "Paris" in line for line in told["warnings"])
    assert (folder / "result.json").is_file()
    code, _ = optikit()
    assert (code, json.loads(report.read_text())["steps"][0]["status"]) == (0, "verified")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"job": "0" * 64}, "of another folder"),
        ({"decoded": " "}, "what was decoded"),
        ({"machine": None}, "doesn't say machine"),
    ],
)
def test_a_result_of_another_folder_is_refused(optikit, tmp_path, change, words):
    assert optikit()[0] == 0
    folder = tmp_path / "out" / "compiled" / "neuron"
    (folder / "smoke.log").write_text(SAID)
    assert check(folder, "record")[0] == 0
    (folder / "smoke.log").unlink()
    found = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(found | change))
    code, said = optikit("--resume")
    assert (code, words in said) == (76, True), said
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"][0]["status"] == "emitted"


def test_heads_of_a_stage_before_lie_beside_the_model_as_nxd_inference_reads_them(tiny_llama, tmp_path):
    import torch
    from safetensors.torch import save_file

    heads = {}
    for head in range(3):
        heads |= {f"{head}.0.linear.weight": torch.full((8, 8), float(head)), f"{head}.0.linear.bias": torch.zeros(8)}
        heads[f"{head}.1.weight"] = torch.ones(16, 8)
    made, dest = tmp_path / "made", tmp_path / "dest"
    (made / "v1").mkdir(parents=True)
    save_file(heads, made / "v1" / "medusa_lm_head.safetensors")
    options = Options(backend="nxd-inference", sequence_length=512)
    job = Job(
        source=tiny_llama, dest=dest, scratch=tmp_path, target=target_row("inf2.xlarge"), inputs={"made_medusa": made}
    )
    dest.mkdir()
    neuron.run(options, job)
    kept = torch.load(dest / "model" / "medusa_heads.pt", weights_only=True)
    assert sorted(kept) == sorted(f"medusa_head_{name}" for name in heads)
    assert torch.equal(kept["medusa_head_2.0.linear.weight"], heads["2.0.linear.weight"])
    script = (dest / "compile.sh").read_text()
    assert "--is-medusa" in script
    assert "--num-medusa-heads 3" in script
    assert "--medusa-speculation-length 4" in script
    assert "--on-device-sampling" not in script
    assert json.loads((dest / "medusa_tree.json").read_text()) == _speculators.chain(3) == [[0], [0, 0], [0, 0, 0]]


def test_a_draft_of_a_stage_before_lies_in_the_folder(tiny_llama, tmp_path):
    made, dest = tmp_path / "made", tmp_path / "dest"
    shutil.copytree(tiny_llama, made / "draft")
    options = Options(backend="nxd-inference", sequence_length=512, speculation_length=5, speculation="fused")
    dest.mkdir()
    job = Job(
        source=tiny_llama, dest=dest, scratch=tmp_path, target=target_row("inf2.xlarge"), inputs={"made_draft": made}
    )
    neuron.run(options, job)
    assert (dest / "draft" / "model.safetensors").read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
    assert json.loads((dest / "draft" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert 'DRAFT="${DRAFT:-draft}"' in (dest / "compile.sh").read_text()
    assert "--enable-fused-speculation" in (dest / "compile.sh").read_text()
    assert "--on-device-sampling" in (dest / "compile.sh").read_text()
    assert "on the same cores" in (dest / "README.md").read_text()
