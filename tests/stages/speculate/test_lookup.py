"""The lookup stage: what it plans, what it writes, and a whole run that measures and chooses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from optikit import stages, targets
from optikit.errors import RecipeError
from optikit.models.reader import read
from optikit.plan import make_plan
from optikit.recipe.load import load
from optikit.runtime.speculation import speculator
from optikit.stage import Job
from optikit.stages.speculate import lookup
from optikit.store.store import Store


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    phrases = (
        "the cat sat on the mat and ",
        "one two three one two three ",
        "abc abc abd abc abc ",
        "row row row your ",
    )
    lines = [json.dumps({"prompt": phrase * (2 + i % 3) + str(i)}) for i in range(3) for phrase in phrases]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def recipe(tmp_path, tiny_llama, prose, prompts):
    def written(**changes):
        value = {
            "model": str(tiny_llama),
            "stages": [
                {"speculate": {"method": "lookup", "prompts": str(prompts), "new_tokens": 24}},
                {"compile": {"engine": "onnxruntime", "head": "float32"}},
            ],
            "evaluate": {
                "perplexity": {"text": str(prose), "window": 32, "windows": 4},
                "speed": {"prompt_tokens": 8, "new_tokens": 6, "repetitions": 2, "warmup": 1},
            },
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(value | changes))
        return path

    return written


def plan_of(path, tmp_path):
    return make_plan(load(path), Store(tmp_path / "home"))


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({}, {3: 8, 2: 4}),
        ({"longest_match": 5, "tokens": 8}, {5: 8, 4: 4, 3: 2, 2: 1}),
        ({"longest_match": 1, "tokens": 3}, {1: 3}),
        ({"longest_match": 8, "tokens": 1}, {8: 1, 7: 1, 6: 1, 5: 1, 4: 1, 3: 1, 2: 1}),
    ],
)
def test_lengths_halve_with_every_token_less(options, lengths):
    assert lookup.Options(**options).lengths() == lengths


def test_what_it_writes_is_what_runtimes_and_servers_read(tmp_path, tiny_llama):
    facts = lookup.run(lookup.Options(exact=True), Job(source=tiny_llama, dest=tmp_path, scratch=tmp_path))
    assert speculator.read(tmp_path).lengths == {3: 8, 2: 4}
    assert speculator.read(tmp_path).min_window == 2
    written = json.loads((tmp_path / "speculator.json").read_text())
    assert written["servers"]["vllm"]["speculative_config"]["prompt_lookup_max"] == 3
    assert facts["loads_in"]["vllm"] == written["loads_in"]["vllm"]
    assert [path.name for path in tmp_path.iterdir()] == ["speculator.json"]


def test_a_window_of_attention_can_be_rolled_back(tiny_llama):
    from dataclasses import replace

    facts = replace(read(tiny_llama), sliding_window=64)
    assert not list(lookup.check(lookup.Options(), facts, targets.find("cpu")))


def test_an_acceptor_has_to_be_there_and_a_lossy_one_allowed(recipe, tmp_path):
    def planned(**options):
        path = recipe()
        value = yaml.safe_load(path.read_text())
        value["stages"][0]["speculate"] |= options
        path.write_text(yaml.safe_dump(value))
        return plan_of(path, tmp_path)

    def refused(**options):
        with pytest.raises(RecipeError) as caught:
            planned(**options)
        return [problem.code for problem in caught.value.problems]

    assert refused(acceptor="nobody") == ["no-acceptor"]
    assert refused(acceptor="typical") == ["speculate-lossy"]
    plan = planned(acceptor="typical", allow_lossy=True)
    (measure,) = [step for step in plan.measures if step.method == "speculation"]
    assert measure.options.acceptor == "typical"
    assert planned(acceptor="rejection").steps


def test_the_plan_keeps_the_model_and_measures_the_speculator(recipe, tmp_path):
    plan = plan_of(recipe(), tmp_path)
    speculate, compiled = plan.steps
    assert compiled.source == speculate.source == ""  # both read the model; a speculator lies beside it
    assert "prompt_lookup" in compiled.after.traits
    measures = {step.name: step for step in plan.measures}
    assert list(measures) == [
        "measure-quality-baseline",
        "measure-quality-2-compile-onnxruntime",
        "measure-speculation",
        "measure-speed",
    ]
    found = measures["measure-speculation"]
    assert (found.source, found.inputs["speculator"]) == (compiled.key, speculate.key)
    assert measures["measure-speed"].inputs["speculator"] == found.key


def test_the_compiled_graph_does_not_depend_on_the_speculator(recipe, tmp_path):
    with_one, without = plan_of(recipe(), tmp_path).steps[-1], None
    stage = [{"compile": {"engine": "onnxruntime", "head": "float32"}}]
    without = plan_of(recipe(stages=stage), tmp_path).steps[-1]
    assert with_one.key == without.key


def test_prompts_decide_the_measurement_and_have_to_be_there(recipe, tmp_path, prompts):
    before = plan_of(recipe(), tmp_path).measures[-2].key
    prompts.write_text(prompts.read_text() + '\n{"prompt": "one more of them"}')
    assert plan_of(recipe(), tmp_path).measures[-2].key != before
    bare = [{"speculate": {"method": "lookup"}}, {"compile": {"engine": "onnxruntime", "head": "float32"}}]
    with pytest.raises(RecipeError) as caught:
        plan_of(recipe(stages=bare), tmp_path)
    assert [problem.code for problem in caught.value.problems] == ["needs-prompts"]
    speed = {"speed": {"prompts": str(prompts), "prompt_tokens": 8, "new_tokens": 6, "repetitions": 2, "warmup": 1}}
    plan = plan_of(recipe(stages=bare, evaluate=speed), tmp_path)
    assert Path(plan.measures[0].files["prompts"]).read_text() == prompts.read_text()


@pytest.mark.slow
def test_a_whole_run_measures_chooses_and_generates_the_same_text(recipe, tmp_path):
    environment = os.environ | {"OPTIKIT_HOME": str(tmp_path / "home"), "NO_COLOR": "1"}

    def optikit(*arguments):
        command = [sys.executable, "-m", "optikit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=400)

    out = tmp_path / "out"
    done = optikit("run", recipe(), "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    found = report["speculation"]
    assert found["method"] == "lookup"
    assert found["lossless"] is True
    assert found["unexplained"] == 0
    assert found["exact_match"] + found["explained_ties"] / found["prompts"] == pytest.approx(1)
    assert found["acceptance_length"] >= 1
    low, high = found["speedup"]["ci95"]
    assert low <= found["speedup"]["value"] <= high
    assert (found["chosen"] == "off") == (min(found["speedup"]["value"], found["predicted_speedup"]) < 1.03)
    assert {path.name for path in (out / "speculator").iterdir()} == {"speculator.json", "tuning.json"}
    assert (out / "model" / "model.safetensors").is_file()
    assert speculator.read(out / "speculator").method == found["chosen"]
    assert report["result"]["size_bytes"] > 0
    assert report["steps"][0]["measurement"]["quality"] is None
    said = [
        optikit("generate", place, "--prompt", "one two three", "--max-tokens", "20")
        for place in (out, out / "compiled/onnxruntime")
    ]
    assert said[0].returncode == 0, said[0].stderr
    again = optikit("run", recipe(), "--out", out)
    assert json.loads((out / "report.json").read_text())["steps"][0]["status"] == "cached", again.stderr


def test_the_card_names_itself():
    assert stages.methods("speculate") == ("lookup",) or "lookup" in stages.methods("speculate")
    assert {"Paper", "Helps", "Hurts", "Cost"} <= {
        line.split()[0] for line in lookup.__doc__.splitlines() if line.strip()
    }
