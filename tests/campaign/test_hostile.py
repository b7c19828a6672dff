"""Hostile inputs over all verbs: an exit code from the table, one message, nothing on the terminal that isn't text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit.errors import Exit
from tests.campaign import hostile
from tests.campaign.figures import Figures, chosen, draw
from tests.campaign.warm import Warm
from tests.campaign.world import World

pytestmark = pytest.mark.slow
COUNT = 320
ALLOWED = [code for code in Exit if code not in (Exit.BUG, Exit.STAGE_FAILED)]


def test_hostile_inputs(world: World, warm: Warm, figures: Figures, tiny_llama: Path, tmp_path: Path) -> None:
    done = warm.run("plan", world.recipe, "--out", world.root / "plan.json", home=world.home, cwd=world.root)
    assert done.code == 0, done.err
    group = figures.group("hostile inputs", COUNT)
    group.run((f"{n}", _case(world, warm, n, tiny_llama, tmp_path / str(n))) for n in chosen(COUNT))
    assert group.wrong == {}


def _case(world: World, warm: Warm, number: int, model: Path, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        here.mkdir()
        kind = hostile.KINDS[number % len(hostile.KINDS)]
        case = kind(hostile.Place(here, world, model, draw("hostile", number)))
        done = warm.run(*case.arguments, home=here / "home", cwd=here)
        wrong = done.faults(ALLOWED)
        shutil.rmtree(here)
        shown = " ".join(repr(str(argument))[:60] for argument in case.arguments)
        return f"exit {done.code}", [f"{kind.__name__} ({case.name}): {shown}: {each}" for each in wrong]

    return run
