"""A tiny pipeline with every kind of step, its finished store and output, and what they have to be again afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.campaign.commands import HANGS_S, Command, Done

TIMED = ("measure-speed", "measure-speculation")
"""Steps whose result holds times: they can't be the same twice."""


@dataclass(frozen=True)
class Step:
    """A step of the pipeline: `began` seconds after the start its process was there, `ended` it was not."""

    name: str
    key: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long its process was there."""
        return self.ended - self.began


@dataclass
class World:
    """The reference."""

    root: Path
    steps: list[Step] = field(default_factory=list)

    @property
    def recipe(self) -> Path:
        """The recipe of all runs."""
        return self.root / "recipe.yaml"

    @property
    def home(self) -> Path:
        """The finished store."""
        return self.root / "home"

    @property
    def out(self) -> Path:
        """The finished output."""
        return self.root / "out"

    def start(
        self,
        *arguments: str | Path,
        home: Path,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
        cold: bool = False,
    ) -> Command:
        """Start optikit in a session of its own, with a store; `cold` in a fresh interpreter."""
        return Command(arguments, cwd or self.root, environment(home) | dict(environ or {}), cold=cold)

    def run(
        self,
        *arguments: str | Path,
        home: Path,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
        seconds: float = HANGS_S,
    ) -> Done:
        """Run optikit to its end."""
        return self.start(*arguments, home=home, cwd=cwd, environ=environ).finish(seconds)

    def make(self, home: Path, out: Path, until: str | None = None) -> Done:
        """Run the recipe."""
        more = ("--until", until) if until else ()
        return self.run("run", self.recipe, "--out", out, "--progress", "plain", *more, home=home)

    def without(self, home: Path, *steps: Step) -> Path:
        """Copy the finished store without the results of some steps."""
        shutil.copytree(self.home, home, symlinks=True)
        for step in steps:
            shutil.rmtree(home / "artifacts" / step.key)
        return home

    def differences(self, home: Path, step: Step) -> list[str]:
        """Compare what a step made with the reference."""
        if step.name.startswith(TIMED):
            there = (home / "artifacts" / step.key / "artifact.json").is_file()
            return [] if there else [f"lost {step.name}"]
        made, wanted = contents(home, step.key), contents(self.home, step.key)
        if made is None:
            return [f"lost {step.name}"]
        names = sorted(name for name in {*made, *(wanted or {})} if made.get(name) != (wanted or {}).get(name))
        return [f"silently different {step.name}: {names}"] if names else []

    def output_differences(self, out: Path) -> list[str]:
        """Compare models, and figures that aren't times, of an output with the reference's."""
        if not (out / "report.json").is_file():
            return ["lost report.json"]
        wanted, found = shipped(self.out), shipped(out)
        names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        wrong = [f"silently different output: {names}"] if names else []
        if figures(out) != figures(self.out):
            wrong.append("silently different figures of the report")
        return wrong


def environment(home: Path) -> dict[str, str]:
    """Return the environment of all commands."""
    return os.environ | {
        "OPTIKIT_HOME": str(home),
        "HOME": str(home.parent),
        "NO_COLOR": "1",
        "COLUMNS": "160",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def contents(home: Path, key: str) -> dict[str, str] | None:
    """Return the sha256 of an artifact's files, and of the facts that aren't times; None if there is none."""
    directory = home / "artifacts" / key
    if not (directory / "artifact.json").is_file():
        return None
    found = {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("artifact.json", "training.jsonl") and "tensorboard" not in path.parts
    }
    facts = json.loads((directory / "artifact.json").read_text(encoding="utf-8"))["facts"]
    return found | {f"fact {name}": repr(value) for name, value in facts.items() if name in ("quality", "tasks")}


def shipped(out: Path) -> dict[str, str]:
    """Return the sha256 of the files that a user deploys; drafting is tuned by times, so it differs."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("model", "compiled")
        for path in sorted((out / folder).rglob("*"))
        if path.is_file()
    }


def figures(out: Path) -> list[Any]:
    """Return the figures of a report that every run has to give again."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    steps = [(step["name"], step["key"], (step["measurement"] or {}).get("quality")) for step in report["steps"]]
    return [*steps, report["baseline"]["quality"], report["result"]["quality"], report["result"]["size_bytes"]]


def build(root: Path, model: Path, prose: Path) -> World:
    """Make the reference step by step, and note when each step's process came and went; or find it made."""
    world = World(root)
    recipe = {
        "model": str(model),
        "calibration": {"text": str(prose), "part": [0.0, 0.7], "samples": 4, "length": 32},
        "stages": [
            {"finetune": {"method": "full", "tokens": 1024, "batch": 4}},
            {"prune": {"method": "sparsegpt", "sparsity": 0.5}},
            {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}},
            {
                "speculate": {
                    "method": "medusa",
                    "heads": 2,
                    "prompts": str(prose),
                    "prompt_tokens": 16,
                    "new_tokens": 16,
                    "tokens": 256,
                    "epochs": 2,
                    "draft_vocab": 64,
                    "eval_prompts": 4,
                    "datastore_answers": 2,
                }
            },
            {"compile": {"engine": "onnxruntime"}},
        ],
        "evaluate": {
            "perplexity": {"text": str(prose), "part": [0.7, 1.0], "window": 32, "windows": 4},
            "speed": {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 2, "warmup": 1},
        },
    }
    root.mkdir(parents=True, exist_ok=True)
    world.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    planned = world.run("plan", world.recipe, "--json", home=world.home)
    if planned.code != 0:
        raise AssertionError(planned.err)
    rows = json.loads(planned.out)
    kept = root / "steps.json"
    earlier = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    if [row["key"] for row in earlier] == [row["key"] for row in (*rows["steps"], *rows["measures"])]:
        world.steps += [Step(**row) for row in earlier]
        return world
    shutil.rmtree(world.home)
    for row in (*rows["steps"], *rows["measures"]):
        world.steps.append(_timed(world, row["name"], row["key"]))
    done = world.make(world.home, world.out)
    if done.code != 0:
        raise AssertionError(done.err)
    kept.write_text(json.dumps([asdict(step) for step in world.steps]), encoding="utf-8")
    return world


def _timed(world: World, name: str, key: str) -> Step:
    """Make a step, and note when its process came and went."""
    began, ended, start = 0.0, 0.0, time.monotonic()
    arguments = ("run", world.recipe, "--out", world.root / "until", "--until", name, "--progress", "none")
    process = world.start(*arguments, home=world.home)
    while process.poll() is None:
        if (world.home / "jobs" / key).exists():
            began = began or time.monotonic() - start
            ended = time.monotonic() - start
        time.sleep(0.01)
    done = process.finish()
    if done.code != 0 or not ended:
        raise AssertionError(f"{name}: {done.err}")
    return Step(name, key, began, ended)
