"""Peak memory of a group of processes, counted by the kernel."""

from __future__ import annotations

import subprocess
import sys

from optikit.process import memory

HOLDS = """
import subprocess, sys
held = bytearray(40 << 20)
held[::4096] = b"x" * len(held[::4096])
more = len(sys.argv) > 1
if more:
    other = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    other.stdout.read(1)
sys.stdout.write("k")
sys.stdout.flush()
sys.stdin.read()
"""


def peak_of(*arguments: str) -> float:
    command = [sys.executable, "-c", HOLDS, *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"k"
        return memory.group_peak_mib(child.pid)
    finally:
        child.communicate()


def test_all_processes_of_a_group_count_and_no_others() -> None:
    alone, both = peak_of(), peak_of(HOLDS)
    assert 40 < alone < 90
    assert both > alone + 40


def test_of_a_group_that_is_gone_there_is_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    child.wait()
    assert memory.group_peak_mib(child.pid) == 0
