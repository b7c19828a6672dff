"""Disks that fill up in every step and at the output: exit 74, nothing half-made, and the next run is whole."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.campaign.figures import Figures, chosen, draw
from tests.campaign.world import Step, World

pytestmark = pytest.mark.slow
PER_STEP, OUTPUTS = 2, 8


@contextmanager
def small_disk(mount: Path) -> Iterator[Path]:
    """Mount a file system of 96 MiB."""
    mount.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Leave so many bytes free."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        with suppress(OSError):
            while True:
                filler.write(bytes(65536))
        filler.truncate(max(0, filler.tell() - leave))


def test_full_disks_in_every_step(world: World, figures: Figures, tmp_path: Path) -> None:
    wanted = PER_STEP * len(world.steps)
    group = figures.group("the store's disk is full in a step", wanted)
    cases = [(number, world.steps[number % len(world.steps)]) for number in chosen(wanted, len(world.steps))]
    group.run((f"{n}: {step.name}", _case(world, step, n, tmp_path / str(n))) for n, step in cases)
    assert group.wrong == {}


def _case(world: World, step: Step, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        with small_disk(here / "disk") as disk:
            return _fill_in(world, step, number, here, disk)

    return run


def _fill_in(world: World, step: Step, number: int, here: Path, disk: Path) -> tuple[str, list[str]]:
    random, home = draw("disk", step.name, number), world.without(disk / "home", step)
    arguments = ("run", world.recipe, "--out", here / "out", "--until", step.name, "--progress", "plain")
    process = world.start(*arguments, home=home)
    wait = 0.0 if number < len(world.steps) else random.random() * step.seconds
    leave = random.choice([0, 0, 4096, 65536])

    def fill_later() -> None:
        while process.poll() is None and not (home / "jobs" / step.key).exists():
            time.sleep(0.002)
        time.sleep(wait)
        fill(disk, leave)

    filling = threading.Thread(target=fill_later)
    filling.start()
    done = process.finish()
    filling.join()
    wrong = done.faults([0, 74])
    if done.code and (home / "artifacts" / step.key).exists():
        wrong.append("an artifact in spite of the error")
    wrong += [f"left {[path.name for path in (home / 'tmp').iterdir()]}"] if any((home / "tmp").iterdir()) else []
    (disk / "filler").unlink()
    wrong += world.make(home, here / "out", step.name).faults([0]) + world.differences(home, step)
    return {0: "fitted", 74: "exit 74"}.get(done.code or 0, f"exit {done.code}"), wrong


def test_full_disks_when_the_output_is_written(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("the output's disk is full", OUTPUTS)
    group.run((str(n), _output_case(world, n, tmp_path / str(n))) for n in chosen(OUTPUTS))
    assert group.wrong == {}


def _output_case(world: World, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        with small_disk(here / "disk") as disk:
            home, out = world.without(here / "home"), disk / "out"
            if number % 2:
                shutil.copytree(world.out, out)
            fill(disk, leave=draw("output's disk", number).choice([0, 0, 4096, 65536, 200_000, 400_000]))
            done = world.make(home, out)
            wrong = done.faults([0, 74])
            if number % 2 and not (out / "model" / "config.json").is_file():
                wrong.append("lost the older output")
            if done.code and not number % 2 and out.exists():
                wrong.append(f"half an output: {sorted(path.name for path in out.iterdir())}")
            (disk / "filler").unlink()
            wrong += world.make(home, out).faults([0]) + world.output_differences(out)
            return {0: "fitted"}.get(done.code or 0, f"exit {done.code}"), wrong

    return run
