"""The main job on a tiny real model: what is written, what is reported, and that doing it twice does nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import numpy as np

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
