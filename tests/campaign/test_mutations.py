"""Damage to the store: healed and told, or refused with 76, but never a result that silently differs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from optikit.store.digests import WORTH_REMEMBERING, Digests
from tests.campaign import damage, values
from tests.campaign.figures import Figures, chosen, draw
from tests.campaign.world import Step, World

pytestmark = pytest.mark.slow
COUNT, LOCKS = 121, 16
MENDED = ("damaged", "set aside")


def test_damage_to_the_store(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("mutations of the store, each followed by a run", COUNT)
    group.run((str(number), _case(world, number, tmp_path / str(number))) for number in chosen(COUNT))
    assert group.wrong == {}


def _case(world: World, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        random, home = draw("mutation", number), world.without(here / "home")
        kind = KINDS[number % len(KINDS)]
        named, told = kind(home, random)
        done = world.make(home, here / "out")
        wrong = done.faults([0, 76])
        if (here / "theirs").exists() and not (here / "theirs" / "file").exists():
            wrong.append("lost a file that a link led to")
        if done.code == 0:
            wrong += world.output_differences(here / "out")
            wrong += [each for step in world.steps for each in world.differences(home, step)]
            wrong += ["mended, but not told"] if told and not any(word in done.err for word in MENDED) else []
        elif done.code == 76:
            again = world.make(home, here / "out")
            wrong += [f"the run after the refusal: {each}" for each in again.faults([0])]
            wrong += world.output_differences(here / "out") if again.code == 0 else []
        shutil.rmtree(here)
        how = {0: "healed" if told else "made anew or not needed", 76: "refused"}.get(
            done.code or 0, f"exit {done.code}"
        )
        return how, [f"{named}: {each}" for each in wrong]

    return run


def test_damage_to_the_lock_of_an_older_output(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("mutations of optikit.lock, each followed by a run over that output", LOCKS)
    group.run((str(number), _lock_case(world, number, tmp_path / str(number))) for number in chosen(LOCKS))
    assert group.wrong == {}


def _lock_case(world: World, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        random, home, out = draw("lock", number), world.without(here / "home"), here / "out"
        shutil.copytree(world.out, out)
        lock = out / "optikit.lock"
        if number % 2:
            named = "another sha256"
            loaded = json.loads(lock.read_text(encoding="utf-8"))
            loaded[random.choice(sorted(loaded))]["sha256"] = random.randbytes(32).hex()
            lock.write_text(json.dumps(loaded, indent=1), encoding="utf-8")
        else:
            named = _damaged(lock, here, random)[0]
        done = world.make(home, out)
        wrong = done.faults([0, 73, 76])
        wrong += ["not found"] if number % 2 and done.code == 0 else []
        wrong += world.output_differences(out) if done.code == 0 else []
        shutil.rmtree(here)
        return {0: "made anew or not needed"}.get(done.code or 0, f"refused with {done.code}"), [
            f"{named}: {each}" for each in wrong
        ]

    return run


# ------------------------------------------------------------------ what is done to a store: what, and is it told


def a_file_of_an_artifact(home: Path, random: Random) -> tuple[str, bool]:
    found = [each for each in sorted((home / "artifacts").rglob("*")) if each.is_file()]
    return _damaged(random.choice(found), home, random)


def a_seal(home: Path, random: Random) -> tuple[str, bool]:
    """Its text stays well-formed."""
    path = random.choice(sorted((home / "artifacts").glob("*/artifact.json")))
    before = path.read_text(encoding="utf-8")
    while path.read_text(encoding="utf-8") == before:
        loaded = json.loads(before)
        part = random.choice([loaded, loaded["facts"], loaded["options"], loaded["files"]])
        made = values.changed(part, random)
        changed = made if part is loaded else {**loaded, _name(loaded, part): made}
        path.write_bytes(json.dumps(changed, indent=1, sort_keys=False).encode("utf-8", "surrogatepass"))
    return f"edited seal of {path.parent.name[:12]}", True


def _name(loaded: dict[str, object], part: object) -> str:
    return next(name for name in ("facts", "options", "files") if loaded[name] is part)


def a_digit_of_a_seal(home: Path, random: Random) -> tuple[str, bool]:
    """One bit of one digit, as a bad disk flips it: it still reads as a number."""
    path = random.choice(sorted((home / "artifacts").glob("*/artifact.json")))
    text = path.read_text(encoding="utf-8")
    at = random.choice([place for place, letter in enumerate(text) if letter in "23456789"])
    path.write_text(f"{text[:at]}{chr(ord(text[at]) ^ 1)}{text[at + 1 :]}", encoding="utf-8")
    return f"another digit in the seal of {path.parent.name[:12]}", True


def an_artifact_in_another_place(home: Path, random: Random) -> tuple[str, bool]:
    one, other = random.sample(sorted((home / "artifacts").iterdir()), 2)
    how = random.choice(["exchanged", "seal of another", "link", "file", "empty", "without its seal"])
    if how == "exchanged":
        one.rename(home / "aside")
        other.rename(one)
        (home / "aside").rename(other)
    elif how == "seal of another":
        shutil.copy(other / "artifact.json", one / "artifact.json")
    elif how == "without its seal":
        (one / "artifact.json").unlink()
    else:
        one.rename(home / "aside")
        {"link": lambda: one.symlink_to(home / "aside"), "file": one.touch, "empty": one.mkdir}[how]()
    return f"{how}: {one.name[:12]}", True


def a_text(home: Path, random: Random) -> tuple[str, bool]:
    found = [each for each in sorted((home / "downloads").rglob("*")) if each.is_file()]
    path = random.choice(found)
    named, changed = _damaged(path, home, random)
    return named, changed and "texts" in path.parts


def a_lock(home: Path, random: Random) -> tuple[str, bool]:
    """And the artifact that it guards is gone, so it is wanted."""
    path = random.choice(sorted((home / "locks").iterdir()))
    gone = home / "artifacts" / path.stem
    what = random.choice([damage.grow, damage.delete, damage.to_directory, damage.to_link, damage.to_pipe])
    what(path, random)
    if gone.is_dir():
        shutil.rmtree(gone)
    return f"{what.__name__} {path.relative_to(home)}", False


def remembered_digests(home: Path, random: Random) -> tuple[str, bool]:
    """As they are after a run on a model of some size, then damaged."""
    large = home.parent / "large"
    with large.open("wb") as file:
        file.truncate(WORTH_REMEMBERING)
    os.utime(large, (1, 1))
    time.sleep(0.05)
    path = home / "digests.json"
    remembered = Digests(path, warn=lambda _: None)
    remembered.read(large)
    remembered.save()
    large.unlink()
    return _damaged(path, home, random)[0], False


def _damaged(path: Path, home: Path, random: Random) -> tuple[str, bool]:
    """Damage a file; return what was done, and whether that is to be told: what isn't there isn't damaged."""
    before, what = path.read_bytes(), random.choice(damage.ALL) if path.stat().st_size else damage.delete
    what(path, random)
    changed = not path.is_file() or path.is_symlink() or path.read_bytes() != before
    told = changed and (what is not damage.delete or path.parent.parent.name == "artifacts")
    return f"{what.__name__} {path.relative_to(home)}", told


def something_odd_in_its_places(home: Path, random: Random) -> tuple[str, bool]:
    """Where a step works that has to be done again; a link leads to somebody's file."""
    theirs = home.parent / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("x", encoding="utf-8")
    artifact = random.choice(sorted((home / "artifacts").iterdir()))
    key = artifact.name
    shutil.rmtree(artifact)
    staging = f"tmp/{key[:16]}-99999999-abcdef01-1@{os.uname().nodename}"
    name = random.choice([f"jobs/{key}", f"scratch/{key}", f"locks/{key}.lock", staging, f"corrupt/{key}"])
    path, how = home / name, random.choice(["file", "pipe", "link", "link", "directory"])
    path.unlink(missing_ok=True)
    {
        "file": lambda: path.write_text("x", encoding="utf-8"),
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(theirs),
        "directory": lambda: shutil.copytree(theirs, path),
    }[how]()
    return f"{how} at {name[:30]}", False


KINDS: tuple[Callable[[Path, Random], tuple[str, bool]], ...] = (
    *(a_file_of_an_artifact, a_file_of_an_artifact, a_file_of_an_artifact, a_file_of_an_artifact),
    *(a_seal, a_digit_of_a_seal, an_artifact_in_another_place, a_text, a_lock, remembered_digests),
    something_odd_in_its_places,
)


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
        process.send_signal(signal.SIGKILL)
        process.finish()
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
