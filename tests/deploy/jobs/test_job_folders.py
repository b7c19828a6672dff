"""Folders for clusters: their own schemas and parsers read them, and what a job can't see is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.model
import botocore.validate
import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from optikit import targets
from optikit.app.submit import Asked, job, named, write
from optikit.deploy import jobs
from optikit.deploy.jobs import RECIPE, SCHEDULERS, Job, k8s, sagemaker, skypilot, slurm
from optikit.errors import CannotCreateError, OptikitError, RecipeError, RefusedError
from optikit.plan import make_plan
from optikit.recipe.load import load
from optikit.store.store import Store

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TEXT = "the river is cold, and nobody swims in it\n" * 4000


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A recipe with a text beside it, an extended base, and a model of 8 B of which only the configuration is here."""
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "llama" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "prose.txt").write_text(TEXT)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "base.yaml").write_text("seed: 7\nvars: {bits: 4, text: ../texts/prose.txt}\n")
    (tmp_path / "work" / "My_recipe.yaml").write_text(
        "extends: base.yaml\nmodel: ../models/llama\ntarget: l4\n"
        "calibration: {text: '${text}', samples: 8, length: 256}\n"
        "stages:\n  - quantize: {method: gptq, bits: '${bits}', group_size: 128}\n"
        "evaluate:\n  perplexity: {text: '${text}', window: 256, windows: 4}\n"
    )
    return tmp_path


def planned(place: Path, *overrides: str, **asked: Any) -> Job:
    loaded = load(place / "work" / "My_recipe.yaml", overrides=overrides)
    plan = make_plan(loaded, Store(place / "store"), weights=False, digests=False)
    return job(loaded, plan, Asked(**{"shared": place / "models", **asked}))


def made(target: str = "cpu", **changes: Any) -> Job:
    row = targets.find(target)
    assert row is not None
    found = Job(
        name="a-job",
        files={RECIPE: b"model: hf:a/b\ntarget: cpu\nstages: []\n", "texts/0-a.txt": bytes(range(256))},
        target=row,
        cpus=4,
        memory_bytes=9 * 2**30,
        disk_bytes=70 * 2**30,
        seconds=7300,
        install="optikit==0.1.0",
    )
    return replace(found, **changes)


def test_the_recipe_goes_along_with_its_texts_and_means_the_same(place: Path) -> None:
    found = planned(place, "stages[0].quantize.group_size=64")
    assert found.name == "my-recipe"
    (text,) = [name for name in found.files if name != RECIPE]
    assert found.files[text].decode() == TEXT
    (place / "there").mkdir()
    for name, content in found.files.items():
        (place / "there" / name).parent.mkdir(exist_ok=True)
        (place / "there" / name).write_bytes(content)
    here = load(place / "work" / "My_recipe.yaml", overrides=("stages[0].quantize.group_size=64",))
    there = load(place / "there" / RECIPE)
    plans = [make_plan(each, Store(place / "store"), weights=False, digests=False) for each in (here, there)]
    assert [step.key for step in plans[0].order] == [step.key for step in plans[1].order]
    assert found.memory_bytes > max(step.estimate.peak_bytes for step in plans[0].order)
    assert found.gpus == 1


def test_what_the_job_cannot_see_is_refused(place: Path) -> None:
    with pytest.raises(RecipeError, match="lies on this machine") as refused:
        planned(place, shared=None)
    assert "--shared" in refused.value.fix
    (place / "texts" / "prose.txt").write_text("https://me:swordfish@host/\n" + TEXT)
    with pytest.raises(RefusedError, match="password"):
        planned(place)
    found = planned(place, shared=place)  # where nothing is copied, nothing leaves this machine
    assert list(found.files) == [RECIPE]
    assert str(place / "texts" / "prose.txt") in found.files[RECIPE].decode()


@given(st.text(max_size=80))
def test_every_name_is_one_for_every_scheduler(text: str) -> None:
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", named(text))


@pytest.mark.parametrize("target", ["cpu", "l4", "ml.g5.12xlarge", "inf2.48xlarge"])
def test_kubernetes_takes_the_manifest(target: str) -> None:
    found = made(target, environment={"HF_HOME": "/store/hf"})
    documents = list(yaml.safe_load_all(k8s.files(found)["job.yaml"]))
    for document in documents:
        kubernetes_validate.validate(document, "1.33", strict=True)
    config, _, job_ = documents
    volumes = {each["name"]: each for each in job_["spec"]["template"]["spec"]["volumes"]}
    paths = {each["path"]: config["binaryData"][each["key"]] for each in volumes["job"]["configMap"]["items"]}
    assert set(paths) == set(found.files)
    limits = job_["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert {"cpu": None, "l4": "1", "ml.g5.12xlarge": "4"}.get(target) == limits.get("nvidia.com/gpu")
    job_["spec"]["template"]["spec"]["containers"][0]["nonsense"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job_, "1.33", strict=True)


def test_a_config_map_has_a_limit() -> None:
    why, fix = k8s.refusal(made(files={RECIPE: b"x" * 800_000}))
    assert "config map" in why
    assert "--shared" in fix


SBATCH = frozenset(
    "job-name nodes ntasks cpus-per-task mem gpus time signal open-mode output requeue".split()  # noqa: SIM905
)
"""Of the options in Slurm's src/sbatch/opt.c and src/common/slurm_opt.c, those that a batch job here may use."""


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_the_batch_script_is_one(target: str, tmp_path: Path) -> None:
    script = slurm.files(made(target, environment={"A": "two words; 'quoted'"}))["job.sh"]
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))
    assert set(asked) <= SBATCH
    assert asked.get("gpus") == ({"h100": "1"}.get(target))
    assert asked["time"] == "02:01:00"
    before, _, after = script.partition("\nSTORE=")
    assert "#SBATCH" not in after, "sbatch reads no directive after the first command"
    assert before.startswith("#!/bin/bash")


PACKAGES = ("slurm-client", "slurm-wlm-basic-plugins", "libmunge2", "liblua5.3-0")
CONFIGURATION = """ClusterName=x
SlurmctldHost=localhost
SlurmctldPort=9
PluginDir={plugins}
AuthType=auth/none
CredType=cred/none
SelectType=select/cons_tres
GresTypes=gpu
MessageTimeout=2
NodeName=localhost CPUs=2
PartitionName=d Nodes=ALL Default=YES
"""
NOBODY = "Unable to contact slurm controller"
"""What sbatch says last, once it has parsed a script and nobody is there to take it."""


@pytest.mark.slow
def test_slurms_own_sbatch_parses_the_directives(tmp_path: Path) -> None:
    """Debian's slurm-client, unpacked, not installed: it parses a script before it looks for a controller."""
    subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=tmp_path, check=True)
    for package in tmp_path.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, tmp_path / "x"], check=True)
    libraries = next((tmp_path / "x" / "usr" / "lib").glob("*-linux-gnu"))
    (tmp_path / "slurm.conf").write_text(CONFIGURATION.format(plugins=libraries / "slurm-wlm"))
    environment = os.environ | {
        "SLURM_CONF": str(tmp_path / "slurm.conf"),
        "LD_LIBRARY_PATH": f"{libraries / 'slurm-wlm'}:{libraries}",
    }

    def parse(script: str) -> str:
        (tmp_path / "job.sh").write_text(script)
        command = [tmp_path / "x" / "usr" / "bin" / "sbatch", "--test-only", tmp_path / "job.sh"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr

    for target in ("cpu", "h100", "ml.g5.12xlarge"):
        assert NOBODY in parse(slurm.files(made(target))["job.sh"])
    script = slurm.files(made())["job.sh"]
    for right, wrong in (("--requeue", "--nonsense"), ("B:TERM@", "B:NONSENSE@"), ("--mem=9216M", "--mem=lots")):
        assert right in script
        assert NOBODY not in parse(script.replace(right, wrong)), wrong


OPTIKIT = """#!/bin/sh
echo "$@" >> "$OPTIKIT_HOME/ran"
trap 'echo stopped >> "$OPTIKIT_HOME/ran"; exit 143' TERM
echo up
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do [ -e "$OPTIKIT_HOME/go" ] && exit 10; sleep 0.5; done
"""


def test_a_preempted_batch_job_stops_well_and_queues_again(tmp_path: Path) -> None:
    """The script itself runs, with scontrol and optikit in the way: Slurm's part is to send TERM to the batch shell."""
    (tmp_path / "job.sh").write_text(slurm.files(made())["job.sh"])
    bins = tmp_path / "store dir" / "venv" / "bin"
    bins.mkdir(parents=True)
    (bins.parents[1] / "home").mkdir()
    for path, text in ((bins / "optikit", OPTIKIT), (bins / "scontrol", '#!/bin/sh\necho "$@" > "$STORE/queued"\n')):
        path.write_text(text)
        path.chmod(0o700)
    store = tmp_path / "store dir"
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "STORE": str(store)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    with start() as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        running.terminate()
        assert running.wait(60) == 143
    ran = (store / "home" / "ran").read_text().splitlines()
    assert ran == [f"run {tmp_path}/{RECIPE} --out {store}/a-job/out --progress plain", "stopped"]
    assert (store / "queued").read_text() == "requeue 7\n"
    (store / "home" / "go").touch()
    with start() as ended:
        assert ended.wait(60) == 10, "the exit code is optikit's own"


@pytest.fixture(scope="module")
def training() -> Any:
    model = botocore.loaders.Loader().load_service_model("sagemaker", "service-2")
    return botocore.model.ServiceModel(model)


@pytest.mark.parametrize("target", ["cpu", "l4", "ml.g5.12xlarge", "trn1.32xlarge", "h100"])
def test_sagemaker_takes_the_request(target: str, training: Any) -> None:
    found = made(target)
    assert sagemaker.refusal(found) == ("", "")
    request = json.loads(sagemaker.files(found)["job.json"])
    shape = training.operation_model("CreateTrainingJob").input_shape
    report = botocore.validate.ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()
    assert request["ResourceConfig"]["InstanceType"] in training.shape_for("TrainingInstanceType").enum
    request["StoppingCondition"]["MaxRuntimeInSeconds"] = "long"
    assert botocore.validate.ParamValidator().validate(request, shape).has_errors()


def test_sagemaker_is_sent_what_the_script_fills_in(tmp_path: Path, training: Any) -> None:
    found = made()
    write(found, "sagemaker", tmp_path / "job")
    tool = tmp_path / "bin" / "aws"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(tmp_path))}/sent\n')
    tool.chmod(0o700)
    role = "arn:aws:iam::999999999999:role/mine"
    path = f"{tool.parent}:{os.environ['PATH']}"
    subprocess.run(["sh", tmp_path / "job" / "submit.sh", "shelf", role], check=True, env=os.environ | {"PATH": path})
    sent = (tmp_path / "sent").read_text().splitlines()
    assert "s3 cp recipe.yaml s3://shelf/a-job/recipe/recipe.yaml" in sent
    assert "s3 cp --recursive texts s3://shelf/a-job/recipe/texts" in sent
    filled = json.loads((tmp_path / "job" / "job.filled.json").read_text())
    assert "CHANGE-ME" not in json.dumps(filled)
    assert filled["RoleArn"] == role
    assert re.fullmatch(r"a-job-\d+", filled["TrainingJobName"])
    assert filled["CheckpointConfig"]["S3Uri"] == "s3://shelf/a-job/store/"


def test_what_a_scheduler_has_no_place_for_is_refused(tmp_path: Path) -> None:
    for scheduler, target in (
        ("sagemaker", "inf2.48xlarge"),
        ("slurm", "trn1.32xlarge"),
        ("skypilot", "inf2.48xlarge"),
    ):
        with pytest.raises(RecipeError) as refused:
            write(made(target), scheduler, tmp_path / "job")
        assert refused.value.fix
        assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_folder_is_written_once_and_says_what_to_type(scheduler: str, tmp_path: Path) -> None:
    found = made("l4")
    names = write(found, scheduler, tmp_path / "job")
    assert (
        sorted(str(each.relative_to(tmp_path / "job")) for each in (tmp_path / "job").rglob("*") if each.is_file())
        == names
    )
    page = (tmp_path / "job" / "README.md").read_text()
    assert jobs.load(scheduler).command(found) in page
    with pytest.raises(CannotCreateError):
        write(found, scheduler, tmp_path / "job")
    with pytest.raises(OptikitError):
        write(found, scheduler, tmp_path / "job" / "README.md" / "job")


def test_the_task_names_accelerators_as_skypilot_does() -> None:
    task = yaml.safe_load(skypilot.files(made("ml.g5.12xlarge"))["task.yaml"])
    assert task["resources"]["accelerators"] == "A10G:4"
    assert "accelerators" not in yaml.safe_load(skypilot.files(made())["task.yaml"])["resources"]


PARSE = """
import sys, sky
from pathlib import Path
for path in sys.argv[1:]:
    task = sky.Task.from_yaml(path)
    (resources,) = task.resources
    print(task.name, resources.accelerators, resources.memory, resources.use_spot, sorted(task.storage_mounts))
try:
    sky.Task.from_yaml_config({"run": "true", "nonsense": 1})
except ValueError:
    print("refuses nonsense")
"""


@pytest.mark.slow
def test_skypilots_own_parser_reads_the_tasks(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "sky"], check=True)
    python = tmp_path / "sky" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "skypilot"], check=True)
    paths = []
    for target in ("cpu", "l4", "a100-80", "ml.g5.12xlarge", "h200"):
        write(made(target), "skypilot", tmp_path / target)
        paths.append(tmp_path / target / "task.yaml")
    environment = os.environ | {"HOME": str(tmp_path)}
    read = subprocess.run([python, "-c", PARSE, *paths], env=environment, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    lines = read.stdout.splitlines()
    assert lines[-1] == "refuses nonsense"
    assert [line.split(" ", 1)[0] for line in lines[:-1]] == ["a-job"] * 5
    assert "{'A100-80GB': 1}" in lines[2]
    assert "{'A10G': 4}" in lines[3]


def test_the_command_line(place: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "optikit",
        "submit",
        "work/My_recipe.yaml",
        "--to",
        "k8s",
        "--out",
        "job",
        "--json",
    ]
    environment = os.environ | {"OPTIKIT_HOME": str(place / "store")}
    refused = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 65
    assert "--shared" in refused.stderr
    done = subprocess.run(
        [*command, "--shared", "models", "--hours", "3"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["files"] == ["README.md", "job.yaml", "recipe.yaml", "texts/0-prose.txt"]
    assert told["asks"]["longest attempt"] == "3.0 h"
