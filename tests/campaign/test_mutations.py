"""Damage to the store: healed and told, or refused with 76, but never a result that silently differs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaign import damage
from tests.campaign.figures import Figures, chosen, draw
from tests.campaign.world import Step, World

pytestmark = pytest.mark.slow
COUNT = 110
MENDED = ("damaged", "set aside")


def test_damage_to_the_store(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("mutations of the store, each followed by a run", COUNT)
    group.run((str(number), _case(world, number, tmp_path / str(number))) for number in chosen(COUNT))
    assert group.wrong == {}


def _case(world: World, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        random = draw("mutation", number)
        home = world.without(here / "home")
        path = random.choice([each for each in sorted(home.rglob("*")) if each.is_file() and each.name != "log.txt"])
        what = random.choice(damage.ALL) if path.stat().st_size else damage.delete
        named = f"{what.__name__} {path.relative_to(home)}"
        before = path.read_bytes()
        what(path, random)
        changed = not path.is_file() or path.is_symlink() or path.read_bytes() != before
        done = world.make(home, here / "out")
        wrong = done.faults([0, 76])
        if done.code == 0:
            wrong += world.output_differences(here / "out")
            wrong += [each for step in world.steps for each in world.differences(home, step)]
            told = any(word in done.err for word in MENDED)
            matters = path.relative_to(home).parts[0] == "artifacts" or "texts" in path.parts
            wrong += ["mended, but not told"] if changed and matters and what is not damage.delete and not told else []
        elif done.code == 76:
            again = world.make(home, here / "out")
            wrong += [f"the run after the refusal: {each}" for each in again.faults([0])]
        shutil.rmtree(here)
        how = {0: "healed", 76: "refused"}.get(done.code or 0, f"exit {done.code}")
        return how, [f"{named}: {each}" for each in wrong]

    return run


KEPT = ("finetune", "prune", "quantize", "speculate")
SCRATCH = 24


def test_damage_to_what_a_killed_step_kept(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("mutations of half-done work, each followed by the resume", SCRATCH)
    steps = [step for step in world.steps if any(f"-{verb}-" in step.name for verb in KEPT)]
    steps = [step for step in steps if not step.name.startswith("measure")]
    cases = [(number, steps[number % len(steps)]) for number in chosen(SCRATCH)]
    group.run((f"{n}: {step.name}", _scratch_case(world, step, n, tmp_path / str(n))) for n, step in cases)
    assert group.wrong == {}


def _scratch_case(world: World, step: Step, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        random = draw("scratch", number)
        home = world.without(here / "home", step)
        scratch, wanted = home / "scratch" / step.key, random.randrange(1, 4)
        arguments = ("run", world.recipe, "--out", here / "out", "--until", step.name, "--progress", "none")
        process = world.start(*arguments, home=home)
        while process.poll() is None and len(_kept(scratch)) < wanted:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        found = _kept(scratch)
        if not found:
            shutil.rmtree(here)
            return "nothing was kept", []
        path = random.choice(found)
        what = random.choice(damage.ALL[:8])
        what(path, random)
        again = world.make(home, here / "out", step.name)
        wrong = again.faults([0, 76])
        if again.code == 76:
            wrong += world.make(home, here / "out", step.name).faults([0])
        wrong += world.differences(home, step)
        shutil.rmtree(here)
        how = {0: "healed", 76: "refused"}.get(again.code or 0, f"exit {again.code}")
        return how, [f"{what.__name__} {path.name}: {each}" for each in wrong]

    return run


def _kept(scratch: Path) -> list[Path]:
    if not scratch.is_dir():
        return []
    try:
        return [path for path in sorted(scratch.rglob("*")) if path.is_file() and path.stat().st_size]
    except FileNotFoundError:
        return []
