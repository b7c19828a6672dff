"""`optikit doctor`: every check finds what is there, and says what to do about what isn't well."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from optikit import host
from optikit.app import doctor
from optikit.errors import UnavailableError
from optikit.targets import probe

GOOD = {
    "cpu": host.cpu_model(),
    "threads": host.threads(),
    "bandwidth_gb_s": 20.0,
    "fp32_tflops": 0.1,
    "bf16_tflops": 0.4,
    "unix_time": 1.0,
    "load": 0.1,
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def found(what):
    return next(finding for finding in doctor.examine() if finding.what == what)


def test_every_finding_that_is_not_well_has_a_fix():
    findings = list(doctor.examine())
    assert {finding.what for finding in findings} >= {"python", "processor", "memory", "store", "disk", "nvidia gpu"}
    assert all(finding.fix for finding in findings if finding.status != "ok")


def test_store_that_cannot_be_made(home):
    home.write_text("a file")
    assert found("store").status == "fail"
    assert "OPTIKIT_HOME" in found("store").fix


def test_disk_levels(tmp_path):
    gib = 2**30
    assert [doctor.disk(free, tmp_path).status for free in (20 * gib, 5 * gib, gib // 2)] == ["ok", "warn", "fail"]


def test_library_below_its_floor_fails(monkeypatch):
    versions = {"torch": "2.10.0", "transformers": "5.3.0", "vllm": "0.17.1"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    status = {finding.what: finding for finding in doctor.libraries()}
    assert status["torch"].status == "fail"
    assert "CVE-2026-4538" in status["torch"].detail
    assert status["torch"].fix == "pip install 'torch>2.10.0'"
    assert status["transformers"].status == "ok"
    assert status["vllm"].status == "fail"
    assert "ray" not in status


def test_local_build_of_a_safe_torch_passes(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu" if name == "torch" else "99")
    assert next(doctor.libraries()).status == "ok"


def test_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")
    finding = doctor.hub()
    assert finding.status == "warn"
    assert "can't be reached" in finding.detail


def test_hub_endpoint_without_encryption_is_refused(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    assert doctor.hub().status == "fail"


def test_calibration_of_this_machine_is_used(tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(GOOD))
    assert probe.measured(file).bandwidth_gb_s == 20.0


@pytest.mark.parametrize(
    "text",
    [json.dumps({**GOOD, "threads": 999}), json.dumps({**GOOD, "cpu": "Z80"}), "{}", "[]", "null", "{", ""],
)
def test_calibration_of_another_machine_or_none_is_not(tmp_path, text):
    file = tmp_path / "calibration.json"
    file.write_text(text)
    assert probe.measured(file) is None
    assert probe.measured(tmp_path / "none.json") is None


def test_calibration_reaches_the_cpu_target(home):
    from optikit import targets

    home.mkdir()
    (home / "calibration.json").write_text(json.dumps(GOOD))
    assert targets.find("cpu").bandwidth_gb_s == 20.0
    assert found("calibration").status == "ok"


def test_calibration_under_load_is_told(home):
    home.mkdir()
    (home / "calibration.json").write_text(json.dumps({**GOOD, "load": 2.5}))
    finding = found("calibration")
    assert (finding.status, "2.5 per thread" in finding.detail) == ("warn", True)


def test_failed_measurement_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UnavailableError, match="the measurement failed"):
        doctor.calibrate(tmp_path / "calibration.json")
    assert not list(tmp_path.glob("*"))


@pytest.mark.slow
def test_measurement_is_plausible(tmp_path: Path):
    file = tmp_path / "deep" / "calibration.json"
    measured = doctor.calibrate(file)
    assert 0.5 < measured.bandwidth_gb_s < 2000
    assert 0.001 < measured.fp32_tflops < 100
    assert probe.measured(file) == measured
    assert list(file.parent.iterdir()) == [file]
