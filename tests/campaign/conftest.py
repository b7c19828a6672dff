"""The campaign: real kills, damage, full disks and hostile inputs, counted. `pytest tests/campaign -m slow -s`.

It does a case per core by itself, without -n. OPTIKIT_CAMPAIGN=0.1 does a tenth of it, OPTIKIT_CAMPAIGN_SEED=1 draws
other cases, OPTIKIT_CAMPAIGN_OUT=FILE gets the figures as JSON, of which `python -m tests.campaign.figures` makes
`examples/campaign.md`. To look at one case again: OPTIKIT_CAMPAIGN_ONLY=17, and OPTIKIT_CAMPAIGN_WORLD=DIR, which keeps
what all cases start from.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign.commands import stop_forkers
from tests.campaign.figures import Figures, start
from tests.campaign.world import World, build

_FIGURES, _BEGAN = Figures(), time.monotonic()


@pytest.fixture(scope="session")
def figures() -> Figures:
    return _FIGURES


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, prose: Path) -> Iterator[World]:
    root = Path(os.environ.get("OPTIKIT_CAMPAIGN_WORLD") or tmp_path_factory.mktemp("campaign"))
    for source, name in ((tiny_llama, "model"), (prose.parent, "prose")):
        if not (root / name).exists():
            shutil.copytree(source, root / name)
    yield start(lambda: build(root, root / "model", root / "prose" / prose.name)).result()
    stop_forkers()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _FIGURES.groups:
        return
    terminalreporter.section("campaign")
    for line in _FIGURES.lines():
        terminalreporter.write_line(line)
    if out := os.environ.get("OPTIKIT_CAMPAIGN_OUT"):
        _FIGURES.write(Path(out), time.monotonic() - _BEGAN)
