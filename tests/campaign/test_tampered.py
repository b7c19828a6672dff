"""Outputs that somebody changed: `verify` and `generate` find it, whatever it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.campaign import damage
from tests.campaign.figures import Figures, chosen, draw
from tests.campaign.world import World

pytestmark = pytest.mark.slow
COUNT, GENERATED = 70, 12
ADDED = (
    *("model/modeling.py", "model/pytorch_model.bin", "model/x.so", "notes.txt", ".hidden", "compiled/x.pyc"),
    *("speculator/x.joblib", "new/folder/x", "model/adapter_config.json"),
)


def test_tampered_outputs(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("tampered outputs: verify", COUNT)
    group.run((str(number), _case(world, number, tmp_path / str(number))) for number in chosen(COUNT))
    assert group.wrong == {}


def _case(world: World, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        out = here / "level" / "out"
        shutil.copytree(world.out, out)
        named = tamper(out, draw("tampered", number), number)
        done = world.run("verify", out, home=here / "home", cwd=here)
        wrong = done.faults([76] if (out / "artifact.json").exists() else [66])
        wrong += ["not found"] if done.code == 0 else []
        shutil.rmtree(here)
        how = {0: "not found", 66: "found to be unfinished", 76: "found"}.get(done.code or 0, f"exit {done.code}")
        return how, [f"{named}: {each}" for each in wrong]

    return run


def tamper(out: Path, random: Random, number: int) -> str:
    """Change an output in one way; return which."""
    if number % 5 == 0:
        path = out / random.choice(ADDED)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"added")
        return f"added {path.relative_to(out)}"
    if number % 5 == 1:
        return _edit_manifest(out / "artifact.json", random)
    path = random.choice([each for each in sorted(out.rglob("*")) if each.is_file() and each.stat().st_size])
    what = random.choice(damage.ALL)
    what(path, random)
    return f"{what.__name__} {path.relative_to(out)}"


def _edit_manifest(path: Path, random: Random) -> str:
    """Change what a seal says, and leave it well-formed."""
    seal = json.loads(path.read_text(encoding="utf-8"))
    name = random.choice(sorted(seal["files"]))
    edits: dict[str, Callable[[], object]] = {
        f"seal without {name}": lambda: seal["files"].pop(name),
        f"seal with another size of {name}": lambda: seal["files"][name].update(size=seal["files"][name]["size"] + 1),
        f"seal with another sha256 of {name}": lambda: seal["files"][name].update(sha256="0" * 64),
        "seal with another key": lambda: seal.update(key="0" * 64),
        "seal of another model": lambda: seal.update(model="another"),
        "seal without steps": lambda: seal.update(steps=[]),
        "seal with a file outside": lambda: seal["files"].update({"../x": {"size": 1, "sha256": "0" * 64}}),
    }
    what = random.choice(sorted(edits))
    edits[what]()
    path.write_text(json.dumps(seal, indent=1), encoding="utf-8")
    return what


def test_a_tampered_model_writes_nothing(world: World, figures: Figures, tmp_path: Path) -> None:
    group = figures.group("tampered outputs: generate", GENERATED)
    group.run((str(number), _generate_case(world, number, tmp_path / str(number))) for number in chosen(GENERATED))
    assert group.wrong == {}


def _generate_case(world: World, number: int, here: Path) -> Callable[[], tuple[str, list[str]]]:
    def run() -> tuple[str, list[str]]:
        random, out = draw("generate", number), here / "level" / "out"
        shutil.copytree(world.out, out)
        shipped = [each for part in ("model", "compiled") for each in sorted((out / part).rglob("*")) if each.is_file()]
        path, what = random.choice(shipped), random.choice(damage.ALL)
        what(path, random)
        asked = ("--prompt", "The", "--max-tokens", "4")
        done = world.run("generate", out, *asked, home=here / "home")
        wrong = done.faults([0, 76])
        if done.code == 0:
            whole = world.run("generate", world.out, *asked, home=here / "home")
            wrong += ["silently different"] if done.out != whole.out or path.is_relative_to(out / "compiled") else []
        shutil.rmtree(here)
        how = {0: "not read by it, the same answer", 76: "found"}.get(done.code or 0, f"exit {done.code}")
        return how, [f"{what.__name__} {path.relative_to(out)}: {each}" for each in wrong]

    return run
