"""A sweep on a real Ray cluster of two nodes, one of which is killed within a step (pytest -m ray)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks import sweep_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def work() -> Iterator[Path]:
    pytest.importorskip("ray")
    path = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # sockets want a short path
    yield path
    shutil.rmtree(path)


def test_a_killed_node_loses_nothing_and_no_step_is_made_twice(work: Path) -> None:
    recipe = sweep_nodes.prepare(work, layers=6, samples=32, windows=(32,))
    killed = sweep_nodes.on_nodes(recipe, work, "k", kill=True)
    assert killed.killed, killed.log
    assert killed.code == 0, killed.log
    assert {each["status"] for each in killed.result["variants"]} == {"done"}
    assert len(killed.result["variants"]) == 2
    assert max(killed.executed().values()) == 1
    blocks = killed.blocks()
    assert blocks, "a walk was cut short"
    assert all(before - found <= 1 for _, before, found in blocks)

    alone = sweep_nodes.in_turn(recipe, work)
    assert alone.code == 0, alone.log
    assert alone.digests() == killed.digests()
    assert len(alone.digests()) >= 2 * 3
    assert alone.executed().keys() == killed.executed().keys()
