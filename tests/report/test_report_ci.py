"""JUnit and GitHub Actions: what CI systems parse."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from optikit.evaluation.results import GateResult
from optikit.report import github, junit


def cases(report):
    root = ET.fromstring(junit.render(report))  # noqa: S314 - our own output
    return root, {(case.get("classname"), case.get("name")): case for case in root.iter("testcase")}


def test_junit_has_one_case_per_gate_and_per_step(full_report):
    root, found = cases(full_report)
    assert root.get("tests") == "9"
    assert root.get("failures") == "0"
    assert ("gates", "perplexity_ratio") in found
    assert found["steps", "quantize gptq"].get("time") == "41.200"
    assert {kind for kind, _ in found} == {"gates", "steps"}
    (suite,) = root
    assert suite.get("tests") == root.get("tests")
    assert suite.get("timestamp") == "2026-11-21T14:03:55"


def test_junit_tells_failures_from_doubt(full_report, thin_report):
    failed = GateResult(name="x", limit="max 1", value=2, ci95=(1.9, 2.1), verdict="fail", reason="too large")
    root, found = cases(full_report.model_copy(update={"gates": (failed,)}))
    assert root.get("failures") == "1"
    assert "too large" in found["gates", "x"].find("failure").get("message")
    root, found = cases(thin_report)
    assert (root.get("failures"), root.get("skipped")) == ("0", "2")
    assert found["gates", "decode_speedup"].find("skipped") is not None


def test_junit_survives_hostile_names(hostile_report, named_report):
    hostile, _ = cases(hostile_report)
    plain, _ = cases(named_report("plain"))
    assert [e.tag for e in hostile.iter()] == [e.tag for e in plain.iter()]
    assert [sorted(e.attrib) for e in hostile.iter()] == [sorted(e.attrib) for e in plain.iter()]


@given(st.text(), st.text())
def test_a_command_is_one_line_that_parses_back(title, message):
    """Parsed as the runner does: `::name key=value::data`, then unescaped."""
    line = github.command("error", title, message)
    assert not re.search(r"[\r\n]", line)
    parsed = re.fullmatch(r"::error title=([^:,]*)::(.*)", line)
    assert parsed
    assert "%" not in re.sub(r"%(25|0D|0A|3A|2C)", "", line)


def test_failed_gates_are_errors_and_doubtful_ones_warnings(full_report, thin_report):
    failed = GateResult(name="x", limit="max 1", value=2, ci95=None, verdict="fail")
    levels = [line.split(" ")[0] for line in github.commands(full_report.model_copy(update={"gates": (failed,)}))]
    assert levels == ["::error", "::warning", "::warning"]
    assert [line.split(" ")[0] for line in github.commands(thin_report)] == ["::warning"]
    assert github.commands(full_report)[-1].startswith("::notice")


def test_no_more_annotations_than_github_shows(full_report):
    report = full_report.model_copy(update={"warnings": tuple(f"warning {i}" for i in range(25))})
    warnings = [line for line in github.commands(report) if line.startswith("::warning")]
    assert len(warnings) == 10
    assert warnings[-1].endswith("and 16 more: see the report")


def test_a_hostile_report_forges_no_command(hostile_report, capfd, tmp_path):
    environ = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    github.publish(hostile_report, environ)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(re.match(r"::(error|warning|notice) title=optikit[^:]*::", line) for line in lines)
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning", "::warning"]
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").startswith("## ")


def test_nothing_is_published_elsewhere(full_report, capfd, tmp_path):
    github.publish(full_report, {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")})
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "summary.md").exists()


def test_the_summary_is_appended_and_never_passes_one_mebibyte(tmp_path):
    path = tmp_path / "summary.md"
    path.write_text("before\n", encoding="utf-8")
    github.append_summary("x×\n" * 400_000, path)
    content = path.read_bytes()
    assert len(content) <= 2**20
    assert content.startswith(b"before\nx")
    assert content.decode().endswith("The whole report is in report.md.*\n")
    github.append_summary("more\n", path)
    assert len(path.read_bytes()) <= 2**20
