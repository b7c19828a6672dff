"""TensorRT-LLM serving folders: what is refused, what the configuration says, that the scripts run up to the server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from optikit.models.reader import read
from optikit.recipe.load import load
from optikit.stage import Job
from optikit.stages.compile import _folder, _trtllm_folder, tensorrt_llm
from optikit.stages.compile._trtllm_options import Options
from tests.stages.compile.conftest import target_row

KNOWN = {
    *("backend", "dtype", "tensor_parallel_size", "max_batch_size", "max_num_tokens", "max_seq_len"),
    *("disable_overlap_scheduler", "kv_cache_config", "speculative_config"),
}
"""Fields of TorchLlmArgs that we write; it refuses unknown ones (tensorrt_llm/llmapi/llm_args.py)."""
SPECULATIVE = {
    "NGram": {"decoding_type", "max_draft_len", "max_matching_ngram_size"},
    "Draft_Target": {"decoding_type", "max_draft_len", "speculative_model"},
}
DRAFTING = {"speculation": "draft", "draft": "org/small"}


def codes(facts, on="l4", **options):
    chosen = Options(**({"sequence_length": 512} | options))
    return [problem.code for problem in tensorrt_llm.check(chosen, facts, target_row(on))]


def emitted(source, out, **options):
    dest = out / "compiled" / "tensorrt-llm"
    dest.mkdir(parents=True)
    (out / "model").symlink_to(source)
    inputs = {"draft": source} if "draft" in options else {}
    job = Job(source=source, dest=dest, scratch=out, inputs=inputs, target=target_row("l4"))
    return dest, tensorrt_llm.run(Options(**({"sequence_length": 512} | options)), job)


def test_what_works_has_no_problems(facts):
    assert codes(facts) == codes(facts, speculation="lookup") == codes(facts, **DRAFTING) == []
    assert codes(facts, kv_cache_dtype="fp8") == []
    assert codes(facts, on="g5.12xlarge", tensor_parallel=4) == []


@pytest.mark.parametrize(
    ("on", "options", "code"),
    [
        ("t4", {}, "engine-not-on-target"),
        ("l4", {"sequence_length": 513}, "longer-than-model"),
        ("a100-80", {"kv_cache_dtype": "fp8"}, "no-fp8"),
        ("l4", {"speculation": "draft"}, "half-a-speculation"),
        ("l4", {"draft": "org/small"}, "half-a-speculation"),
        ("l4", {"speculation": "lookup", "overlap_scheduler": True}, "overlap-scheduler"),
    ],
)
def test_what_cannot_be_served(facts, on, options, code):
    assert codes(facts, on, **options) == [code]


@pytest.mark.parametrize("options", [{}, {"speculation": "lookup"}, DRAFTING, {"dtype": "float16", "batch_size": 3}])
def test_the_configuration_has_only_fields_that_the_server_knows(tiny_llama, tmp_path, options):
    dest, found = emitted(tiny_llama, tmp_path, **options)
    assert found["emitted"]
    assert found["files"] == sorted(str(p.relative_to(dest)) for p in dest.rglob("*") if p.is_file())
    settings = yaml.safe_load((dest / "serve.yaml").read_text())
    assert settings.keys() <= KNOWN
    assert settings["max_seq_len"] == 512
    drafting = settings.get("speculative_config")
    assert (drafting is None) == (not options.get("speculation"))
    if drafting:
        assert drafting.keys() == SPECULATIVE[drafting["decoding_type"]]
        assert settings["disable_overlap_scheduler"] is True
    told = json.loads((dest / "model" / "config.json").read_text())
    assert told["torch_dtype"] == options.get("dtype", "bfloat16")


def test_the_server_starts_with_the_weights_beside_its_configuration(tiny_gptq, tmp_path):
    dest, _ = emitted(tiny_gptq, tmp_path, speculation="lookup")
    for script in ("serve.sh", "smoke.sh"):
        subprocess.run(["sh", "-n", script], cwd=dest, check=True)
    for _ in range(2):  # the second start finds its own links
        done = subprocess.run(["sh", "serve.sh"], cwd=tmp_path.parent, check=False, capture_output=True)
        assert done.returncode != 0  # run from elsewhere: no such script
        done = subprocess.run(["sh", dest / "serve.sh"], cwd="/", check=False, capture_output=True, text=True)
        assert (done.returncode, "trtllm-serve" in done.stderr) == (127, True)  # everything but the server was there
    linked = dest / "model" / "model.safetensors"
    assert linked.is_symlink()
    assert not linked.readlink().is_absolute()
    assert linked.read_bytes() == (tiny_gptq / "model.safetensors").read_bytes()
    assert json.loads((dest / "model" / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert read(dest / "model").traits == {"int4_gptq"}
    missing = subprocess.run(
        ["sh", dest / "serve.sh"], env=os.environ | {"MODEL": "/nowhere"}, check=False, capture_output=True, text=True
    )
    assert (missing.returncode, "set MODEL" in missing.stderr) == (66, True)


def test_the_readme_says_what_to_do_and_what_is_loaded(tiny_llama, tmp_path):
    dest, _ = emitted(tiny_llama, tmp_path, **DRAFTING)
    text = (dest / "README.md").read_text()
    for said in ("docker build", "compiled/tensorrt-llm/run.sh", "lies in `draft/`", "Nothing here was run", "No awq"):
        assert said in text
    assert _trtllm_folder.IMAGE + ":1.2.1" in (dest / "Dockerfile").read_text()


def test_the_shipped_example_is_what_its_recipe_writes_today():
    root = Path(__file__).parents[3]
    options = load(root / "recipes" / "smollm2-135m-trtllm-emit.yaml").recipe.stages[-1].options
    example = root / "examples" / "tensorrt"
    assert isinstance(options, Options)
    assert (example / "serve.yaml").read_text() == _trtllm_folder.serve_yaml(options, target_row("l4"))
    assert (example / "serve.sh").read_text() == _trtllm_folder.serve_sh(options)
    assert (example / "smoke.sh").read_text() == _folder.smoke(8000, 10)
    assert (example / "run.sh").read_text() == _trtllm_folder.RUN
