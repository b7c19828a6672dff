"""Environments for GPUs: every lock is whole for every machine it is offered on, and the driver decides."""

from __future__ import annotations

import platform
import tomllib

import pytest

from optikit import environments
from optikit.app import doctor
from optikit.environments import cuda
from optikit.environments.definition import CUDA_ROWS, ROOT, cuda_rows, narrowed, normalized
from optikit.errors import UnavailableError
from optikit.targets import nvidia

NEW, OLD = nvidia.Driver(version="580.65.06", cuda=(13, 0)), nvidia.Driver(version="535.104.05", cuda=(12, 2))
WHEELS = tomllib.loads((ROOT / CUDA_ROWS).read_text(encoding="utf-8"))
OFFERED = [
    (name, machine, python)
    for name, row in WHEELS.items()
    for machine in ("x86_64", "aarch64")
    for python in row[machine]
]


def pins(name, machine, python):
    lock = narrowed((ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8"), machine, python)
    return environments.Definition(name=name, summary="", python=python, lock=lock, imports=()).pins


def test_every_row_has_its_wheels_or_a_reason():
    assert WHEELS.keys() == cuda_rows().keys()
    for name, row in WHEELS.items():
        for machine in ("x86_64", "aarch64"):
            assert row[machine] or row["absent"][machine], name
    assert {name for name in WHEELS if not (ROOT / "locks" / f"{name}.txt").exists()} == {"tensorrt-llm-cuda13"}
    assert "no wheel of tensorrt-llm" in WHEELS["tensorrt-llm-cuda13"]["absent"]["x86_64"]


@pytest.mark.parametrize(("name", "machine", "python"), OFFERED)
def test_a_lock_holds_torch_for_its_cuda_and_what_optikit_needs(name, machine, python):
    found, row = pins(name, machine, python), cuda_rows()[name]
    assert {"torch", "transformers", "safetensors", "pydantic", "packaging", "tokenizers"} <= found.keys()
    assert {normalized(each) for each in row.get("sources", ())} <= found.keys()
    blas = [version for package, version in found.items() if package in ("nvidia-cublas-cu12", "nvidia-cublas")]
    assert [version.partition(".")[0] for version in blas] == [str(row["cuda"])]
    assert not any("+cpu" in version for version in found.values())


@pytest.mark.parametrize("name", [name for name, row in WHEELS.items() if row.get(platform.machine())])
def test_a_definition_is_as_strict_as_those_for_cpus(name):
    found = environments.find(name)  # every line has a version and a hash, or this raises
    assert found.cuda == cuda_rows()[name]["cuda"]
    assert found.device == "cuda"
    assert found.digest != environments.find("llm-compressor").digest


def test_the_driver_decides():
    def names(driver, machine, own="3.11"):
        return {offer.name: offer.python for offer in cuda.offers(driver, machine, own) if offer.python}

    assert names(None, "x86_64") == {}
    new, old = names(NEW, "x86_64"), names(OLD, "x86_64")
    assert set(old) == {name for name in new if name.endswith("cuda12")}
    assert new["llm-compressor-cuda13"] == "3.11"
    assert names(NEW, "x86_64", "3.12")["llm-compressor-cuda13"] == "3.12"
    assert names(NEW, "x86_64", "3.12")["auto-gptq-cuda12"] == "3.11"  # the only one that it has wheels for
    assert all(name.endswith("cuda13") for name in names(NEW, "aarch64"))  # torch for CUDA 12 is x86-64 only there
    whys = {offer.name: offer.why for offer in cuda.offers(OLD, "aarch64", "3.11")}
    assert "driver 535.104.05 runs CUDA 12.2, and it needs 13" in whys["gptqmodel-cuda13"]
    assert all(whys.values())


def test_a_step_gets_the_latest_that_runs_or_the_one_for_cpus(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for driver, wanted in ((NEW, "gptqmodel-cuda13"), (OLD, "gptqmodel-cuda12"), (None, "gptqmodel")):
        monkeypatch.setattr(cuda, "driver", lambda driver=driver: driver)
        name, why = cuda.choose("gptqmodel", "cuda")
        assert (name, bool(why)) == (wanted, driver is None)
        assert cuda.choose("gptqmodel", "cpu") == ("gptqmodel", "")
    monkeypatch.setattr(cuda, "driver", lambda: NEW)
    assert cuda.choose("openvino", "cuda") == ("openvino", "openvino has no environment for CUDA")


def test_what_has_no_wheel_here_is_no_environment(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(UnavailableError, match="no environment vllm-cuda13 for riscv64"):
        environments.find("vllm-cuda13")


def test_doctor_says_which_rows_there_are_and_why_not_the_others():
    told = {finding.what: finding for finding in doctor.cuda_environments(cuda.offers(NEW, "x86_64", "3.11"))}
    assert told["env vllm-cuda13"].detail == "for steps on --device cuda, python 3.11"
    assert "no wheel of tensorrt-llm" in told["env tensorrt-llm-cuda13"].detail
    assert "on the CPU" not in told["env tensorrt-llm-cuda13"].detail  # it has no environment for that
    none = {finding.what: finding for finding in doctor.cuda_environments(cuda.offers(None, "x86_64", "3.11"))}
    assert "gptqmodel computes on the CPU" in none["env gptqmodel-cuda12"].detail
