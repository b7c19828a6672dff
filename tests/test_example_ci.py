"""The CI example: its workflow runs commands that exist, and its files are what a failed gate leaves."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest
import yaml

path = Path(__file__).parent / "benchmarks" / "ci_example.py"
spec = importlib.util.spec_from_file_location("ci_example", path)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def test_the_recorded_files_are_what_the_command_writes():
    for name, content in example.files().items():
        assert (example.PLACE / name).read_text(encoding="utf-8") == content, name


def test_the_gate_fails_and_is_annotated():
    report = example.judged()
    assert report.verdict == "fail"
    (error,) = [line for line in example.files()["annotations.txt"].splitlines() if line.startswith("::error ")]
    assert "perplexity_ratio is 1." in error
    assert "limit max 1.005" in error


def test_junit_is_read_by_a_parser_that_ci_systems_use(tmp_path):
    junitparser = pytest.importorskip("junitparser")  # in the dev extra
    (tmp_path / "junit.xml").write_text(example.files()["junit.xml"], encoding="utf-8")
    (suite,) = junitparser.JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    found = {(case.classname, case.name): case.result for case in suite}
    assert isinstance(found["gates", "perplexity_ratio"][0], junitparser.Failure)
    assert "limit max 1.005" in found["gates", "perplexity_ratio"][0].message
    assert found["gates", "size_ratio"] == []
    assert suite.failures == 1
    assert suite.tests == len(found)


def test_the_workflow_runs_commands_that_exist():
    from typer.testing import CliRunner

    from optikit.cli.app import app

    workflow = yaml.safe_load((example.PLACE / "optikit.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["optimize"]["steps"]
    lines = [shlex.split(step["run"]) for step in steps if step.get("run", "").startswith("optikit ")]
    assert [line[1] for line in lines] == ["plan", "run"]
    for line in lines:
        shown = CliRunner().invoke(app, [line[1], "--help"]).output
        assert all(option in shown for option in line if option.startswith("--"))
        recipe = next(word for word in line if word.endswith(".yaml"))
        assert (example.ROOT / recipe).is_file()
