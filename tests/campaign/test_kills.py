"""Kills at random moments of every step and of output writing: nothing is lost, and what is made after is the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.campaign.figures import Figures, chosen, draw
from tests.campaign.world import Step, World, finish

pytestmark = pytest.mark.slow
IN_STEPS, IN_OUTPUT = 130, 30
LEFT = ("tmp", "jobs", "scratch")


def test_kills_in_every_step(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("kills in steps, each followed by a resume", IN_STEPS)
    cases = [(number, world.steps[number % len(world.steps)]) for number in chosen(IN_STEPS)]
    group.run((f"{n}: {step.name}", _case(world, step, n, tmp_path / str(n))) for n, step in cases)
    assert group.wrong == {}


def _case(world: World, step: Step, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        random = draw("kill", step.name, number)
        home = world.without(here / "home", step)
        arguments = ("run", world.recipe, "--out", here / "out", "--until", step.name, "--progress", "none")
        process = world.start(*arguments, home=home)
        whom = random.choice(["optikit", "optikit", "worker"])
        hit = _kill(process, home / "jobs" / step.key, random.random() * (step.ended - step.began) * 1.1, whom)
        first = finish(process)
        again = world.make(home, here / "out", step.name)
        wrong = again.faults([0]) + world.differences(home, step)
        left = [f"{path.parent.name}/{path.name}"[:40] for each in LEFT for path in (home / each).iterdir()]
        wrong += [f"left {left}"] if left and again.code == 0 else []
        if hit == "worker killed" and first.code not in (137, 0):
            wrong += first.faults([137])
        shutil.rmtree(here)
        return hit, wrong

    return run


def _kill(process: subprocess.Popen[str], job: Path, seconds: float, whom: str) -> str:
    """Kill optikit, or the process of its step, some seconds after that came; return what was hit."""
    while process.poll() is None and not job.exists():
        time.sleep(0.002)
    time.sleep(seconds)
    if process.poll() is not None:
        return "finished before the kill"
    if whom == "optikit":
        process.kill()
        return "optikit killed"
    children = psutil.Process(process.pid).children()
    if not children:
        process.kill()
        return "optikit killed"
    try:
        os.kill(children[0].pid, signal.SIGKILL)
    except ProcessLookupError:
        return "finished before the kill"
    return "worker killed"


def test_kills_while_the_output_is_written(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("kills while the output is written", IN_OUTPUT)
    group.run((str(n), _output_case(world, n, tmp_path / str(n))) for n in chosen(IN_OUTPUT))
    assert group.wrong == {}


def _output_case(world: World, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        random = draw("output", number)
        home, out = world.without(here / "home"), here / "out"
        if number % 2:
            shutil.copytree(world.out, out)
        before = {path.name for path in here.iterdir()}
        process = world.start("run", world.recipe, "--out", out, "--progress", "none", home=home)
        while process.poll() is None and {path.name for path in here.iterdir()} == before:
            time.sleep(0.0005)  # until the output begins to appear beside, or in, its place
        time.sleep(random.random() * 0.2)
        hit = "killed" if process.poll() is None else "finished before the kill"
        process.send_signal(random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        finish(process)
        wrong = ["lost the older output"] if number % 2 and not (out / "model").is_dir() else []
        again = world.make(home, out)
        wrong += again.faults([0])
        if again.code == 0:
            wrong += world.output_differences(out) + world.run("verify", out, home=home).faults([0])
            left = sorted(path.name for path in here.iterdir() if path.name not in ("home", "out"))
            wrong += [f"left {left}"] if left else []
        shutil.rmtree(here)
        return hit, wrong

    return run
