"""The main job on a tiny real model: what is written, what is reported, and that doing it twice does nothing.

And with `serve:`: the folders are there, sealed, and what they start answers. All of it looks at one run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

if TYPE_CHECKING:
    from tests.e2e.conftest import Finished


def test_the_output_is_complete(finished: Finished) -> None:
    names = {path.relative_to(finished.out).as_posix() for path in finished.out.rglob("*") if path.is_file()}
    assert {"artifact.json", "recipe.yaml", "optikit.lock", "report.json", "report.md", "report.html"} <= names
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= names
    assert {"compiled/onnxruntime/model.onnx", "compiled/onnxruntime/genai_config.json"} <= names


def test_the_recipe_is_kept_verbatim(finished: Finished) -> None:
    assert (finished.out / "recipe.yaml").read_bytes() == finished.recipe.read_bytes()


def test_the_manifest_names_every_shipped_file_with_its_hash(finished: Finished) -> None:
    manifest = json.loads((finished.out / "artifact.json").read_text())
    for name, entry in manifest["files"].items():
        data = (finished.out / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"]), name
    assert "onnx" in manifest["traits"]


def test_the_report_holds_measured_numbers(finished: Finished) -> None:
    report = finished.report
    assert report["schema_version"] == 1
    assert report["verdict"] == "pass"
    assert [step["verb"] for step in report["steps"]] == ["quantize", "compile"]
    assert {step["status"] for step in report["steps"]} == {"executed"}
    quality, base = report["result"]["quality"], report["baseline"]["quality"]
    assert quality["runtime"] == "onnxruntime"
    low, high = quality["perplexity"]["ratio_ci95"]
    assert low <= quality["perplexity"]["ratio"] <= high
    assert np.isclose(quality["perplexity"]["value"] / base["perplexity"]["value"], quality["perplexity"]["ratio"])
    assert quality["kl_divergence"]["mean"] > 0
    assert 0 < quality["top1_agreement"] <= 1
    assert report["result"]["size_bytes"] < report["baseline"]["size_bytes"]
    assert all(step["peak_memory_mib"] > 50 for step in report["steps"])
    speed = report["result"]["speed"]
    assert np.isclose(speed["decode_tokens_per_s"], 1000 / speed["tpot_ms_p50"], rtol=0.01)


def test_quality_is_measured_after_every_stage(finished: Finished) -> None:
    for step in finished.report["steps"]:
        assert step["measurement"]["quality"]["perplexity"]["value"] > 1, step["name"]


def test_the_compiled_weights_equal_what_was_quantized(finished: Finished) -> None:
    facts: dict[str, Any] = finished.report["steps"][1]["facts"]
    assert facts["linears_compared"] == facts["linears_bit_equal"] == 14


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_the_html_report_is_one_file_without_scripts(finished: Finished) -> None:
    text = (finished.out / "report.html").read_text(encoding="utf-8")
    parser = _Tags()
    parser.feed(text)
    assert "svg" in parser.tags
    assert "script" not in parser.tags
    assert not any(name.startswith("on") for name in parser.attributes)
    assert len(text) < 300_000


def test_a_second_run_does_no_work(finished: Finished) -> None:
    again = finished.cli("run", finished.recipe, "--out", finished.out)
    assert again.returncode == 0, again.stderr
    report = finished.report
    assert {step["status"] for step in (*report["steps"], *report["measures"])} == {"cached"}
    assert list((finished.cli.home / "jobs").iterdir()) == []


def test_a_changed_option_reruns_only_what_depends_on_it(finished: Finished) -> None:
    out = finished.out.with_name("smaller-group")
    changed = finished.cli("run", finished.recipe, "--out", out, "--set", "evaluate.perplexity.windows=3", "--json")
    assert changed.returncode == 0, changed.stderr
    report = json.loads(changed.stdout)
    assert {step["status"] for step in report["steps"]} == {"cached"}
    assert "executed" in {step["status"] for step in report["measures"]}
    shutil.rmtree(out)


def test_verify_accepts_the_output_and_finds_a_flipped_byte(finished: Finished) -> None:
    copy = finished.out.with_name("copy")
    shutil.copytree(finished.out, copy)
    assert finished.cli("verify", copy).returncode == 0
    weights = copy / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    broken = finished.cli("verify", copy)
    assert broken.returncode == 76
    assert "model.safetensors" in broken.stderr + broken.stdout
    shutil.rmtree(copy)


def test_generate_streams_text_from_the_output(finished: Finished) -> None:
    done = finished.cli("generate", finished.out, "--prompt", "The river", "--max-tokens", "5")
    assert done.returncode == 0, done.stderr


def test_a_failed_gate_has_its_own_exit_code(finished: Finished) -> None:
    out = finished.out.with_name("gated")
    done = finished.cli("run", finished.recipe, "--out", out, "--set", "gates.perplexity_ratio.max=0.5")
    assert done.returncode == 10
    assert json.loads((out / "report.json").read_text())["verdict"] == "fail"
    shutil.rmtree(out)


def test_plan_names_the_steps_and_that_they_are_cached(finished: Finished) -> None:
    done = finished.cli("plan", finished.recipe, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [step["name"] for step in plan["steps"]] == ["1-quantize-gptq", "2-compile-onnxruntime"]
    assert all(step["cached"] for step in (*plan["steps"], *plan["measures"]))


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
