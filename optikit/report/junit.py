"""A report as JUnit XML: one test case per gate and one per step, for CI systems that draw test results.

A failed gate is a failure. An inconclusive gate and an emitted step are skipped, with the reason: neither has failed;
`--strict` turns the former into an exit code. A report whose verdict is `emitted` has one more case, skipped.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from optikit import text
from optikit.evaluation.results import GateResult, Report, StepReport
from optikit.report import gates, wording


def render(report: Report) -> str:
    """Return the XML document, declaration included."""
    suite = ET.Element("testsuite", name=wording.model_name(report), timestamp=_timestamp(report.created))
    for gate in report.gates:
        _gate(suite, gate)
    if report.verdict == "emitted":
        case = ET.SubElement(suite, "testcase", classname="verdict", name=gates.verdict(report), time="0")
        ET.SubElement(case, "skipped", message=gates.EMITTED)
    for step in (*report.steps, *report.measures):
        _step(suite, step)
    cases = suite.findall("testcase")
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": "0",
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
        "time": f"{sum(float(case.get('time', 0)) for case in cases):.3f}",
    }
    root = ET.Element("testsuites", counts, name="optikit")
    suite.attrib.update(counts)
    root.append(suite)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _timestamp(iso: str) -> str:
    """JUnit's schema wants local ISO time without zone."""
    return text.clean(iso).partition("+")[0]


def _gate(suite: ET.Element, gate: GateResult) -> None:
    case = ET.SubElement(suite, "testcase", classname="gates", name=gates.name(gate), time="0")
    interval = gates.interval(gate)
    seen = f"{gates.value(gate)}{f' ({interval})' if interval else ''}, limit {gate.limit}"
    said = text.clean(f"{seen}: {gate.reason}" if gate.reason else seen)
    if gate.verdict == "pass":
        ET.SubElement(case, "system-out").text = said
        return
    tag = "failure" if gate.verdict == "fail" else "skipped"
    ET.SubElement(case, tag, message=f"{gate.verdict}: {said}").text = said


def _step(suite: ET.Element, step: StepReport) -> None:
    name = wording.step_label(step)
    case = ET.SubElement(suite, "testcase", classname="steps", name=name, time=f"{step.seconds:.3f}")
    if step.status == "emitted":
        ET.SubElement(case, "skipped", message="emitted: its files are written, running them needs the device")
        return
    ET.SubElement(case, "system-out").text = f"{step.status}, peak {text.memory(step.peak_memory_mib)}"
