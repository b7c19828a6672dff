"""Kills at random moments of every step and of output writing: nothing is lost, and what is made after is the same."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.campaign.commands import Command
from tests.campaign.figures import Figures, Group, chosen, draw
from tests.campaign.world import Step, World

pytestmark = pytest.mark.slow
IN_STEPS, IN_OUTPUT = 132, 30
COLD = 6
"""One of so many is of a fresh interpreter."""
IMPORTS_S = 3.0
"""Seconds that such a step imports before it works."""
WRITING_S = 0.2
"""Within how many seconds of its beginning the output is written."""
LEFT = ("tmp", "jobs", "scratch")


def test_kills_in_every_step(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("kills in steps, each followed by a resume", IN_STEPS)
    cases = [(number, world.steps[number % len(world.steps)]) for number in chosen(IN_STEPS)]
    group.run((f"{n}: {step.name}", _case(world, group, step, n, tmp_path / str(n))) for n, step in cases)
    assert group.wrong == {}


def _case(world: World, group: Group, step: Step, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        random, cold = draw("kill", step.name, number), number % COLD == 0
        home = world.without(here / "home", step)
        whom, wait = random.choice(["optikit", "optikit", "worker"]), random.random() * step.seconds
        arguments = ("run", world.recipe, "--out", here / "out", "--until", step.name, "--progress", "none")
        while True:
            command = world.start(*arguments, home=home, cold=cold)
            hit = _kill(command, home / "jobs" / step.key, wait + (random.random() * IMPORTS_S if cold else 0), whom)
            first = command.finish()
            if first.code:
                break
            wait *= 0.7  # it was faster than the reference: again
            shutil.rmtree(home / "artifacts" / step.key)
        again = world.make(home, here / "out", step.name)
        wrong = again.faults([0]) + world.differences(home, step)
        left = [f"{path.parent.name}/{path.name}"[:40] for each in LEFT for path in (home / each).iterdir()]
        wrong += [f"left {left}"] if left and again.code == 0 else []
        wrong += first.faults([-signal.SIGKILL, 137])
        group.among[step.name.lstrip("0123456789-")] += 1
        shutil.rmtree(here)
        return f"{hit} killed{', in a fresh interpreter' if cold else ''}", wrong

    return run


def _kill(command: Command, job: Path, seconds: float, whom: str) -> str:
    """Kill optikit, or the process of its step, some seconds after that came; return whom."""
    while command.poll() is None and not job.exists():
        time.sleep(0.002)
    time.sleep(seconds)
    children = []
    if whom == "worker":
        with suppress(psutil.Error):
            children = psutil.Process(command.pid).children()
    if not children:
        command.send_signal(signal.SIGKILL)
        return "optikit"
    with suppress(psutil.Error):
        children[0].kill()
    return whom


def test_kills_while_the_output_is_written(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("kills while the output is written", IN_OUTPUT)
    group.run((str(n), _output_case(world, n, tmp_path / str(n))) for n in chosen(IN_OUTPUT))
    assert group.wrong == {}


def _output_case(world: World, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        random, wait, first = draw("output", number), WRITING_S, 0
        home, out = world.without(here / "home"), here / "out"
        how = random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        while not first:
            shutil.rmtree(out, ignore_errors=True)
            if number % 2:
                shutil.copytree(world.out, out)
            before = {path.name for path in here.iterdir()}
            command = world.start("run", world.recipe, "--out", out, "--progress", "none", home=home)
            while command.poll() is None and {path.name for path in here.iterdir()} == before:
                time.sleep(0.0005)  # until the output begins to appear beside, or in, its place
            time.sleep(random.random() * wait)
            command.send_signal(how)
            first, wait = command.finish().code or 0, wait * 0.8
        wrong = ["lost the older output"] if number % 2 and not _is_whole(world, here, out) else []
        again = world.make(home, out)
        wrong += again.faults([0])
        if again.code == 0:
            wrong += world.output_differences(out) + world.run("verify", out, home=home).faults([0])
            left = sorted(path.name for path in here.iterdir() if path.name not in ("home", "out"))
            wrong += [f"left {left}"] if left else []
        shutil.rmtree(here)
        return f"optikit got {how.name}", wrong

    return run


def _is_whole(world: World, here: Path, out: Path) -> bool:
    """Return whether everything of an output is still there, in its place or where it stepped aside."""
    there = [path for place in (out, *here.glob(".out.*")) if place.is_dir() for path in place.rglob("*")]
    return {path.name for path in world.out.rglob("*")} <= {path.name for path in there}
