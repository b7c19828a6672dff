"""Energy counters: a made sysfs tree, wrap-around, what may not be read, and machines without any."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.evaluation import energy
from optikit.evaluation.speed_schedule import Rounds, conduct, joules_per_token

RANGE = 262_143_328_850


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


def zone(root, path, name, value, wraps_at=RANGE):
    """Write a zone; sysfs lists subzones beside their parent, too."""
    directory = root / path
    directory.mkdir(parents=True)
    (directory / "name").write_text(f"{name}\n")
    (directory / "energy_uj").write_text(f"{value}\n")
    (directory / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    return directory / "energy_uj"


@pytest.fixture
def server(tmp_path):
    """Two sockets, each with cores and memory, and a zone for the whole platform, which counts all of it again."""
    return {
        "package-0": zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000),
        "core": zone(tmp_path, "intel-rapl:0:0", "core", 500_000),
        "dram-0": zone(tmp_path, "intel-rapl:0:1", "dram", 100_000, wraps_at=65_712_999_613),
        "package-1": zone(tmp_path, "intel-rapl:1", "package-1", RANGE - 1_000_000),
        "dram-1": zone(tmp_path, "intel-rapl:1:0", "dram", 0, wraps_at=65_712_999_613),
        "psys": zone(tmp_path, "intel-rapl:2", "psys", 9_000_000),
    }


def test_packages_and_memory_are_counted_once(server, tmp_path):
    (tmp_path / "intel-rapl").mkdir()  # the control type itself, which has no counter
    meter = energy.find(tmp_path)
    assert [counter.name for counter in meter.counters] == ["package-0", "dram-0", "package-1", "dram-1"]
    assert meter.reason == ""
    before = meter.read()
    for name, value in (("package-0", 4_000_000), ("dram-0", 600_000), ("core", 9_000_000), ("psys", 99_000_000)):
        server[name].write_text(str(value))
    server["package-1"].write_text("1000000")  # it started again from zero on the way
    assert meter.joules(before, meter.read()) == pytest.approx(3 + 0.5 + 2)


@given(st.integers(0, RANGE - 1), st.integers(0, RANGE - 1))
def test_a_counter_that_wraps_once_tells_the_same_as_one_that_does_not(start, grown):
    assert energy.spent(start, (start + grown) % RANGE, RANGE) == grown
    assert energy.spent(start, start + grown, None) == grown


def test_a_machine_without_counters_says_so(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        meter = energy.find(place)
        assert meter.reason == energy.NO_COUNTERS
        assert meter.joules(meter.read(), meter.read()) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_counters_of_root_alone_are_named(server, tmp_path):
    server["package-0"].chmod(0)
    assert energy.find(tmp_path).reason == f"the energy counter {server['package-0']} is readable by root only"


def test_a_counter_that_is_no_number_is_told(server, tmp_path):
    server["dram-0"].write_text("n/a")
    meter = energy.find(tmp_path)
    assert meter.counters == ()
    assert "can't be read: invalid literal" in meter.reason


def test_gpus_count_millijoules(monkeypatch, tmp_path):
    class NVMLError(Exception):
        pass

    totals = {0: 5_000, 1: 7_000}
    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda _: "NVIDIA L4",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: totals[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    meter = energy.find(tmp_path)
    assert [counter.name for counter in meter.counters] == ["NVIDIA L4 0", "NVIDIA L4 1"]
    before = meter.read()
    totals[1] += 2_500
    assert meter.joules(before, meter.read()) == pytest.approx(2.5)

    def missing():
        raise NVMLError

    library.nvmlInit = missing
    assert energy.find(tmp_path).reason == energy.NO_COUNTERS


class Arm:
    """Answers as an arm does, and spends energy while at it."""

    def __init__(self, counter: Path, microjoules: int) -> None:
        self.counter = counter
        self.microjoules = microjoules

    def ask(self, _, *, new_tokens, **__):
        self.counter.write_text(str(int(self.counter.read_text()) + self.microjoules))
        return {"start_ns": 0, "token_ns": list(range(1, new_tokens + 1)), "tokens": [1] * new_tokens}


def test_every_run_is_charged_to_the_arm_that_ran(server, tmp_path):
    arms = {name: Arm(server["package-0"], spent) for name, spent in (("baseline", 8_000_000), ("result", 2_000_000))}
    meter = energy.find(tmp_path)
    samples = list(conduct(arms, [[1, 2]], Rounds(2, 4, 16), lambda *_: None, meter))
    assert joules_per_token(samples, "baseline") == pytest.approx(0.5)
    assert joules_per_token(samples, "result") == pytest.approx(0.125)
    assert samples[0].as_json()["energy_j"] == pytest.approx(8)
    without = list(conduct(arms, [[1, 2]], Rounds(1, 2, 16), lambda *_: None, energy.find(tmp_path / "nowhere")))
    assert joules_per_token(without, "baseline") is None
