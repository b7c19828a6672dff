"""`optikit targets`, `stages`, `explain`, `doctor`: what they print, and how they end."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from optikit.cli.doctor import doctor
from optikit.cli.explain import explain
from optikit.cli.stages import stages
from optikit.cli.targets import targets
from optikit.errors import RecipeError, UsageError
from optikit.rules import rules
from optikit.stages import registry

app = typer.Typer()
for verb in (targets, stages, explain, doctor):
    app.command()(verb)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))


def run(*arguments: str):
    return CliRunner().invoke(app, arguments, catch_exceptions=True)


def test_targets_as_a_table():
    result = run("targets")
    assert result.exit_code == 0
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("ml.g5.12xlarge"))
    assert line.split() == ["ml.g5.12xlarge", "4", "x", "A10G", "89.4", "2400", "280", "7.09"]


def test_targets_as_json_with_sources():
    found = {row["name"]: row for row in json.loads(run("targets", "--json").stdout)}
    assert found["h100"]["bandwidth_gb_s"] == 3350
    assert found["h100"]["source"].startswith("https://www.nvidia.com/")


def test_targets_of_the_user(tmp_path):
    extra = tmp_path / "my.toml"
    extra.write_text('[my-box]\nlike = "l4"\n')
    assert "my-box" in run("targets", "--targets", str(extra)).stdout
    extra.write_text('[my-box]\nlike = "l5"\n')
    assert isinstance(run("targets", "--targets", str(extra)).exception, RecipeError)


def test_stages_lists_every_method():
    text = run("stages").stdout
    found = json.loads(run("stages", "--json").stdout)
    expected = [(verb, method) for verb, methods in registry().items() for method in methods]
    assert [(row["verb"], row["method"]) for row in found] == expected
    assert all(row["summary"] in text for row in found)


@pytest.mark.parametrize("name", rules())
def test_every_rule_is_explained(name):
    text = run("explain", name).stdout
    rule = rules()[name]
    for part in (name, rule.why, rule.fix, rule.source, rule.date):
        assert part in text


def test_stage_is_explained_with_card_and_defaults():
    for what in ("gptq", "quantize.gptq"):
        text = run("explain", what).stdout
        assert "arXiv:2210.17323" in text
        assert "- quantize: {method: gptq}" in text
        assert any(line.split()[:2] == ["bits", "4"] for line in text.splitlines())


def test_libraries_that_do_a_stage_are_explained_with_options_of_their_own():
    text = run("explain", "awq").stdout
    assert "`optikit explain awq.autoawq`" in text
    assert "llm-compressor   not here: " in text
    for what in ("autoawq", "awq.autoawq", "quantize.awq.autoawq"):
        text = run("explain", what).stdout
        assert "- quantize: {method: awq, backend: autoawq}" in text
        assert "runs in the environment 'autoawq'" in text
        assert any(line.startswith("duo_scaling") for line in text.splitlines())
    found = {(row["verb"], row["method"]): row for row in json.loads(run("stages", "--json").stdout)}
    assert "duo_scaling" in found["quantize", "awq"]["backends"]["autoawq"]["options"]["properties"]
    assert found["quantize", "rtn"]["backends"] == {}


def test_engine_is_explained_with_its_key():
    assert "- compile: {engine: onnxruntime}" in run("explain", "onnxruntime").stdout


def test_target_is_explained():
    text = run("explain", "trn1.32xlarge").stdout
    assert "host_memory_gib        512" in text
    assert "price_source" in text


@pytest.mark.parametrize(("code", "words"), [("65", "recipe"), ("0", "ok"), ("124", "longer than its timeout")])
def test_exit_code_is_explained(code, words):
    assert words in run("explain", code).stdout


def test_unknown_word_is_guessed():
    result = run("explain", "quantise-twice")
    assert isinstance(result.exception, UsageError)
    assert result.exception.fix == "did you mean 'quantize-twice'?"
    assert isinstance(run("explain", "3").exception, UsageError)
    assert isinstance(run("explain").exception, UsageError)


def test_list_of_rules():
    lines = run("explain", "--list").stdout.splitlines()
    assert len(lines) == 1 + len(rules())
    assert max(map(len, lines)) <= 140


def test_doctor_as_text_and_json():
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert {row["what"] for row in found} >= {"python", "memory", "store"}
    assert result.exit_code == (69 if any(row["status"] == "fail" for row in found) else 0)
    assert "python" in run("doctor").stdout


def test_doctor_ends_with_69_when_something_fails(tmp_path):
    (tmp_path / "home").write_text("in the way")
    result = run("doctor")
    assert result.exit_code == 69
    assert "fail  store" in result.stdout
