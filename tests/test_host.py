"""What a process may use of its machine: the control groups' limits count, its own and those around it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from optikit import host
from optikit.process import memory

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host, "GROUPS", tmp_path / "fs")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cgroup").write_text("")
    return tmp_path / "fs"


def told(groups: Path, own: str, files: dict[str, str]) -> None:
    groups.with_name("cgroup").write_text(own)
    for name, content in files.items():
        path = groups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


SECOND = "0::/user.slice/job\n"
FIRST = "4:memory:/jobs/a\n1:cpu,cpuacct:/jobs/a\n0::/\n"
CPU = [
    (SECOND, {"user.slice/job/cpu.max": "200000 100000\n"}, 2),
    (SECOND, {"user.slice/job/cpu.max": "max 100000\n", "user.slice/cpu.max": "150000 100000\n"}, 2),
    (SECOND, {"user.slice/job/cpu.max": "10000 100000\n"}, 1),
    (SECOND, {"cpu.max": "300000 100000\n"}, 3),  # a container sees its own group at the root
    (SECOND, {"cpu.max": "1600000 100000\n"}, 8),
    (SECOND, {"cpu.max": "damaged\n", "user.slice/cpu.max": ""}, 8),
    (FIRST, {"cpu/jobs/a/cpu.cfs_quota_us": "-1\n", "cpu/jobs/a/cpu.cfs_period_us": "100000\n"}, 8),
    (FIRST, {"cpu/jobs/cpu.cfs_quota_us": "250000\n", "cpu/jobs/cpu.cfs_period_us": "100000\n"}, 3),
    ("", {"cpu.max": "100000 100000\n"}, 8),
]


@pytest.mark.parametrize(("own", "files", "threads"), CPU)
def test_threads_are_those_of_the_quota(groups: Path, own: str, files: dict[str, str], threads: int) -> None:
    told(groups, own, files)
    assert host.threads() == threads


MEMORY = [
    (SECOND, {"user.slice/job/memory.max": f"{GIB}\n"}, GIB),
    (SECOND, {"user.slice/job/memory.max": "max\n", "user.slice/memory.max": f"{GIB}\n"}, GIB),
    (FIRST, {"memory/jobs/a/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
    (FIRST, {"memory/jobs/a/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    (FIRST, {"memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
    (FIRST, {"cpu/memory.limit_in_bytes": f"{GIB}\n"}, None),
]


@pytest.mark.parametrize(("own", "files", "limit"), MEMORY)
def test_memory_is_that_of_the_tightest_group(groups: Path, own: str, files: dict[str, str], limit: int | None) -> None:
    whole = host.memory_bytes()
    told(groups, own, files)
    assert host.memory_bytes() == (limit or whole)


def test_a_step_gets_less_than_all_of_it_and_no_more_than_it_is_allowed(groups: Path) -> None:
    told(groups, SECOND, {"user.slice/job/memory.max": f"{GIB}\n"})
    assert host.room_bytes() == GIB - host.KEPT_BYTES
    assert host.room_bytes(100) == 100
    assert host.room_bytes(64 * GIB) == GIB - host.KEPT_BYTES


@pytest.mark.parametrize(
    ("own", "files", "count"),
    [
        (SECOND, {"user.slice/job/memory.events": "low 0\noom 4\noom_kill 3\n"}, 3),
        (FIRST, {"memory/jobs/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"}, 2),
        ("", {}, 0),
    ],
)
def test_kills_for_memory_are_those_of_the_own_group(groups: Path, own: str, files: dict[str, str], count: int) -> None:
    told(groups, own, files)
    assert memory.kills() == count
