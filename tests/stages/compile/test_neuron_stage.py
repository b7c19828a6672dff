"""Neuron job folders: what is refused, what the scripts say, and that the real libraries take what we write."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.stage import Job
from optikit.stages.compile import _neuron_folder, _neuron_options, neuron
from optikit.stages.compile._neuron_options import Options
from optikit.stages.compile._overlay import for_both
from tests.stages.compile.conftest import target_row

SPECULATING = {"speculation_length": 4, "draft": "org/small"}
NXD = {"backend": "nxd-inference", "sdk": "2.29"}


def codes(facts, on="inf2.xlarge", **options):
    chosen = Options(**({"sequence_length": 512} | options))
    return [problem.code for problem in neuron.check(chosen, facts, target_row(on))]


def emitted(source, out, on="inf2.xlarge", **options):
    dest = out / "compiled" / "neuron"
    dest.mkdir(parents=True)
    if not (out / "model").exists():
        (out / "model").symlink_to(source)
    inputs = {"draft": source} if "draft" in options else {}
    job = Job(source=source, dest=dest, scratch=out, inputs=inputs, target=target_row(on))
    return dest, neuron.run(Options(**({"sequence_length": 512} | options)), job)


def shell(script, cwd, **environment):
    found = subprocess.run(
        ["sh", "-c", script], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    return found.returncode, found.stdout, found.stderr


class TestCheck:
    def test_what_works_has_no_problems(self, facts):
        assert codes(facts) == codes(facts, **NXD, **SPECULATING, speculation="fused", async_mode=True) == []
        assert codes(facts, on="trn2.48xlarge", backend="vllm-neuron") == []

    @pytest.mark.parametrize(
        ("options", "code"),
        [
            ({"sequence_length": 513}, "longer-than-model"),
            ({"quantization_dtype": "int8"}, "not-this-backend"),
            ({"speculation": "fused", **SPECULATING}, "not-this-backend"),
            ({"draft": "org/small"}, "half-a-speculation"),
            ({"speculation_length": 4}, "half-a-speculation"),
            ({"batch_size": 2, **SPECULATING}, "speculation-batch"),
            ({"backend": "vllm-neuron", **SPECULATING}, "speculator-unused"),
            ({**NXD, **SPECULATING, "on_device_sampling": True}, "speculation-sampling"),
            ({**NXD, **SPECULATING, "speculation": "fused", "on_device_sampling": False}, "speculation-sampling"),
            ({**NXD, **SPECULATING, "acceptor": "rejection"}, "no-such-acceptor"),
            ({"acceptor": "rejection"}, "no-such-acceptor"),
            ({"first_core": 2}, "no-such-cores"),
            ({"backend": "vllm-neuron", "on_device_sampling": False}, "not-this-backend"),
            ({"backend": "vllm-neuron", "cache": "s3://bucket/x"}, "cache-not-a-directory"),
        ],
    )
    def test_what_a_backend_does_not_have(self, facts, options, code):
        assert codes(facts, **options) == [code]

    @pytest.mark.parametrize(
        ("trait", "options", "found"),
        [
            ("draft_model", {}, ["half-a-speculation"]),
            ("draft_model", {"speculation_length": 4}, []),
            ("draft_model", SPECULATING, ["two-drafts"]),
            ("prompt_lookup", {}, ["speculator-unused"]),
            ("prompt_lookup", NXD, ["speculator-unused"]),
            ("medusa_heads", {**NXD, "batch_size": 2}, ["speculation-batch"]),
            ("medusa_heads", {**NXD, "speculation_length": 4}, ["half-a-speculation"]),
            ("medusa_heads", NXD, []),
        ],
    )
    def test_what_a_stage_before_has_made_is_used_or_refused(self, facts, trait, options, found):
        assert codes(facts.having(trait), **options) == found

    def test_instances_and_families_that_a_backend_does_not_know(self, facts):
        assert codes(facts, on="trn3") == ["unknown-instance"]
        assert codes(facts, on="trn3", backend="vllm-neuron") == []
        assert codes(replace(facts, model_type="qwen2"), **NXD) == ["unknown-architecture"]

    @pytest.mark.parametrize(("name", "family"), [("ml.inf2.48xlarge", "inf2"), ("trn1.2xlarge", "trn1")])
    def test_families_of_instances(self, name, family):
        assert _neuron_options.instance_family(target_row(name)) == family


class TestScripts:
    @pytest.mark.parametrize(
        ("on", "options"),
        [
            ("inf2.xlarge", {}),
            ("inf2.xlarge", {**SPECULATING, "on_device_sampling": False}),
            ("trn2.48xlarge", {"batch_size": 4}),
            ("inf2.xlarge", {**NXD, **SPECULATING, "speculation": "fused"}),
            (
                "trn1.2xlarge",
                {**NXD, "quantization_dtype": "f8e4m3", "quantized_checkpoints_path": "a b", "batch_size": 2},
            ),
            ("trn2.48xlarge", {"backend": "vllm-neuron"}),
        ],
    )
    def test_every_folder_is_whole_and_its_scripts_parse(self, tiny_llama, tmp_path, on, options):
        dest, found = emitted(tiny_llama, tmp_path, on, **options)
        assert found["emitted"]
        assert found["files"] == sorted(str(p.relative_to(dest)) for p in dest.rglob("*") if p.is_file())
        readme = (dest / "README.md").read_text()
        for script in dest.glob("*.sh"):
            assert shell(f"sh -n {script.name}", dest) == (0, "", "")
            assert script.name in readme
        assert "compiled/neuron/run.sh" in readme
        assert found["finish"].split()[1] in found["files"]
        assert "pip.repos.neuron.amazonaws.com" in (dest / "requirements.txt").read_text()
        assert {path.parent.name for path in dest.rglob("*.safetensors")} == (
            {"draft"} if "draft" in options else set()
        )

    @given(text=st.text(st.characters(codec="ascii", exclude_characters="\0\r"), min_size=1).filter(str.strip))
    def test_any_text_keeps_its_meaning_in_a_script(self, text):
        script = f'X="${{X:-{_neuron_folder._inside_quotes(text)}}}"; printf "%s." "$X"'
        assert shell(script, ".", X="") == (0, text + ".", "")

    def test_weights_are_linked_and_another_model_is_refused(self, tiny_llama, tmp_path):
        dest, _ = emitted(tiny_llama, tmp_path)
        prepare = f"{shlex.quote(sys.executable)} job.py prepare"
        assert shell(f"{prepare} ../../model", dest)[0] == 0
        assert shell(f"{prepare} ../../model", dest)[0] == 0  # again, over its own links
        linked = dest / "model" / "model.safetensors"
        assert linked.read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
        assert not (dest / "model" / "config.json").is_symlink()
        other = tmp_path / "other"
        other.mkdir()
        for path in tiny_llama.iterdir():
            (other / path.name).write_bytes(path.read_bytes() + (b" " if path.name == "config.json" else b""))
        code, _, error = shell(f"{prepare} {other}", dest)
        assert (code, "another model" in error) == (1, True)
        (other / "config.json").write_bytes((tiny_llama / "config.json").read_bytes().replace(b"true", b"True"))
        code, _, error = shell(f"{prepare} {other}", dest)
        assert (code, "isn't the file" in error) == (1, True)

    def test_the_key_follows_shapes_compiler_and_flags_but_not_the_cache(self, tiny_llama, tmp_path):
        dest, _ = emitted(tiny_llama, tmp_path)
        other, _ = emitted(tiny_llama, tmp_path / "other", batch_size=2)
        key = f"{shlex.quote(sys.executable)} job.py key"
        plain = shell(key, dest, NEURON_CC_FLAGS="")
        assert plain == shell(key, dest, NEURON_CC_FLAGS="--cache_dir=/elsewhere")
        assert len({plain, shell(key, dest, NEURON_CC_FLAGS="-O1"), shell(key, other, NEURON_CC_FLAGS="")}) == 3

    def test_a_finished_result_lists_its_files(self, tiny_llama, tmp_path):
        dest, _ = emitted(tiny_llama, tmp_path)
        (dest / "compiled-x").mkdir()
        (dest / "compiled-x" / "model.pt").write_bytes(b"graph")
        assert shell(f"{shlex.quote(sys.executable)} job.py result compiled-x", dest)[0] == 0
        told = json.loads((dest / "compiled-x" / "result.json").read_text())
        assert told["files"]["model.pt"]["size"] == 5
        assert told["job"]["batch_size"] == 1
        assert "transformers" in told["versions"]


def test_configurations_are_spoken_for_both_versions():
    found = for_both(
        {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}, "float16"
    )
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert found["dtype"] == found["torch_dtype"] == "float16"
    assert found["rope_parameters"]["rope_theta"] == 5e5
    tokenizer = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "eos_token": "</s>"}
    assert for_both(tokenizer, "float16") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
    }


NEURON_PYTHON = "OPTIKIT_TEST_NEURON_PYTHON"
"""An interpreter with optimum-neuron 0.4.5 and transformers 4.57.6; without it, the test builds one."""

ASK = """
import argparse, json, shlex, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from optimum.commands.export.neuronx import parse_args_neuronx
from optimum.neuron.utils.instance import normalize_instance_type
from optimum.neuron.models.inference.backend.config import NxDNeuronConfig
import torch
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
ours = NxDNeuronConfig(**job["neuron_config"])
draft = NxDNeuronConfig(**job["draft_config"])
script = (folder / "compile.sh").read_text()
command = script[script.index("optimum-cli export neuron"):].split('"$OUT"')[0].replace("\\\\\\n", " ")
parser = argparse.ArgumentParser()
parse_args_neuronx(parser)
args = parser.parse_args([*shlex.split(command)[3:], "out"])
assert args.batch_size == ours.batch_size and args.sequence_length == ours.sequence_length
assert args.tensor_parallel_size == ours.tp_degree and normalize_instance_type(args.instance_type) == ours.target
config = AutoConfig.from_pretrained(folder / "model")
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
model = AutoModelForCausalLM.from_pretrained(folder / "model", torch_dtype=torch.float32)
tokens = torch.arange(3, 40)[None]
with torch.no_grad():
    logits = model(tokens).logits[0, -1]
json.dump({"ours": {name: str(value) for name, value in vars(ours).items()}, "task": args.task,
    "dtype": args.torch_dtype,
    "draft_sampling": draft.on_device_sampling, "theta": config.rope_theta, "text": tokenizer.encode("a b"),
    "logits": logits.tolist()}, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def neuron_python(tmp_path_factory):
    given = os.environ.get(NEURON_PYTHON)
    if given:
        return given
    place = tmp_path_factory.mktemp("neuron")
    venv.create(place, with_pip=True)
    wanted = ["optimum-neuron==0.4.5", "transformers==4.57.6"]
    subprocess.run([place / "bin" / "pip", "install", "--quiet", *wanted], check=True)
    return str(place / "bin" / "python")


@pytest.mark.slow
@pytest.mark.network
def test_optimum_neuron_takes_what_is_emitted(tmp_path, neuron_python):
    """Its configuration class, its export command's parser, and its transformers' reading of our model directory."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.conftest import build_tiny_llama

    source = tmp_path / "source"
    source.mkdir()
    build_tiny_llama(source)
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 123456.0  # not what 4.57 takes where it finds none
    (source / "config.json").write_text(json.dumps(config))
    dest, _ = emitted(source, tmp_path / "out", batch_size=2)
    assert shell(f"{neuron_python} job.py prepare ../../model", dest)[0] == 0
    answer = tmp_path / "answer.json"
    subprocess.run([neuron_python, "-c", ASK, dest, answer], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    told = json.loads(answer.read_text())
    taken = {name: str(value) for name, value in json.loads((dest / "job.json").read_text())["neuron_config"].items()}
    assert told["ours"] | taken | {"torch_dtype": "torch.bfloat16"} == told["ours"]
    assert (told["ours"]["batch_size"], told["ours"]["continuous_batching"]) == ("2", "True")
    assert (told["task"], told["dtype"], told["theta"]) == ("text-generation", "bfloat16", 123456.0)
    assert told["draft_sampling"] is False
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        ours = model(torch.arange(3, 40)[None]).logits[0, -1]
    assert torch.allclose(ours, torch.tensor(told["logits"]), atol=1e-4)


def test_the_shipped_example_is_what_its_recipe_writes_today():
    from optikit.recipe.load import load

    root = Path(__file__).parents[3]
    entry = load(root / "recipes" / "smollm2-135m-neuron-emit.yaml").recipe.stages[-1]
    example = root / "examples" / "neuron"
    scripts = dict(_neuron_folder._scripts(entry.options, None, target_row("inf2.xlarge")))
    assert {name: (example / name).read_text() for name in scripts} == scripts
    told = json.loads((example / "job.json").read_text())
    assert told["neuron_config"] == _neuron_folder.neuron_config(entry.options, "inf2")
    assert json.loads((example / "model" / "config.json").read_text())["rope_theta"] == 100000.0
