"""Hostile inputs over all verbs: an exit code from the table, one message, nothing on the terminal that isn't text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit.cli.app import VERBS
from optikit.errors import Exit
from tests.campaign import hostile
from tests.campaign.figures import Figures, Group, chosen, draw, start
from tests.campaign.world import World

pytestmark = pytest.mark.slow
COUNT = 336
BOUND_S = 60.0
"""Seconds that no command may take, whatever it is given, on a machine that does other things as well."""
ALLOWED = [code for code in Exit if code not in (Exit.BUG, Exit.STAGE_FAILED)]


def test_hostile_inputs(world: World, figures: Figures, tiny_llama: Path, tmp_path: Path) -> None:
    plan = ("plan", world.recipe, "--out", world.root / "plan.json")
    done = start(lambda: world.run(*plan, home=world.home)).result()
    assert done.code == 0, done.err
    group = figures.group("hostile inputs", COUNT)
    group.run((f"{n}", _case(world, group, n, tiny_llama, tmp_path / str(n))) for n in chosen(COUNT))
    assert group.wrong == {}


def _case(world: World, group: Group, number: int, model: Path, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        here.mkdir()
        kind = hostile.KINDS[number % len(hostile.KINDS)]
        case = kind(hostile.Place(here, world, model, draw("hostile", number)))
        done = world.run(*case.arguments, home=here / "home", cwd=here, seconds=BOUND_S)
        case.after()
        wrong = done.faults(ALLOWED)
        group.among[verb if (verb := str(case.arguments[0])) in VERBS else "no verb"] += 1
        shutil.rmtree(here)
        shown = " ".join(repr(str(argument))[:60] for argument in case.arguments)
        return f"exit {done.code}", [f"{kind.__name__} ({case.name}): {shown}: {each}" for each in wrong]

    return run
