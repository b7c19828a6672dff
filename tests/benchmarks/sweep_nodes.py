"""A sweep of 12 recipes that share 2 prefixes: separately, on two Ray nodes, and with one of them killed.

    python tests/benchmarks/sweep_nodes.py --work /tmp/w --write examples/sweep

Everything is real: `ray start` twice, each node with folders and a view of the store of its own, `optikit sweep` and
`optikit run` as commands, kill -9 of all that a node has. What is counted comes from the runs' own events and reports.
WORK has to be a short path, for Ray's sockets. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.record import commit  # noqa: E402 - of this tree
from tests.conftest import build_tiny_llama, teach, write_prose  # noqa: E402
from tests.ray_cluster import Node, two_nodes  # noqa: E402

RECIPE = """\
# {layers} layers of a tiny Llama: two prefixes (GPTQ and AWQ), each measured in six ways.
model: tiny
calibration: {{text: prose.txt, part: [0.0, 0.7], samples: {samples}, length: 128}}
stages:
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
evaluate:
  perplexity: {{text: prose.txt, part: [0.7, 1.0], window: 64, windows: 16}}
sweep:
  vary:
    stages:
      - [{{quantize: {{method: gptq, bits: 4, group_size: 32}}}}]
      - [{{quantize: {{method: awq, bits: 4, group_size: 32}}}}]
    evaluate.perplexity.window: [{windows}]
"""
COMPARED = ("model/", "compiled/")


def prepare(work: Path, *, layers: int, samples: int, windows: tuple[int, ...]) -> Path:
    """Write a model, a text and the recipe; return the recipe."""
    data = work / "data"
    data.mkdir(parents=True)
    prose = write_prose(data / "prose.txt")
    raw = build_tiny_llama(data / "raw", layers=layers)
    (data / "tiny").mkdir()
    teach(raw, data / "tiny", prose)
    shutil.rmtree(raw)
    recipe = data / "recipe.yaml"
    shown = ", ".join(map(str, windows))
    recipe.write_text(RECIPE.format(layers=layers, samples=samples, windows=shown), encoding="utf-8")
    return recipe


@dataclass
class Swept:
    """What a sweep left: its report, how long it took, and what its runs told."""

    out: Path
    seconds: float
    code: int
    result: dict[str, Any]
    killed: list[str] = field(default_factory=list)
    log: str = ""

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the events of all runs, in order of each, with the variant's name."""
        for log in sorted(self.out.glob("variants/*/run*.log")):
            for line in log.read_text(encoding="utf-8").splitlines():
                if line.startswith('{"event"'):
                    yield log.parent.name, json.loads(line)

    def keys(self, variant: str) -> dict[str, str]:
        """Return the keys of a variant's steps by name."""
        result = next(each for each in self.result["variants"] if each["name"] == variant)
        return {step["name"]: step["key"] for step in result["steps"]}

    def executed(self) -> Counter[str]:
        """Return how often each step was made to its end, by key, also in runs that were killed later."""
        found: Counter[str] = Counter()
        for variant, event in self.events():
            if event["event"] == "finish" and event["status"] == "executed":
                found[self.keys(variant)[event["name"]]] += 1
        return found

    def blocks(self) -> list[tuple[str, int, int]]:
        """Return for each step that was cut short and begun again: name, blocks told before, blocks found done.

        A walk tells the number of a block when it has done it: the second process found one less than its first.
        """
        found = []
        last: dict[tuple[str, str], int] = {}
        fresh: set[tuple[str, str]] = set()
        for variant, event in self.events():
            step = (variant, event.get("name", ""))
            if event["event"] == "start":
                fresh.add(step)
            elif event["event"] == "update" and event["what"] == "block":
                if step in fresh and step in last:
                    found.append((f"{variant}: {event['name']}", last[step], event["done"] - 1))
                fresh.discard(step)
                last[step] = event["done"]
        return found

    def digests(self) -> dict[str, str]:
        """Return the sha256 of every file that a recipe decides to the byte."""
        found = {}
        for seal in sorted(self.out.glob("variants/*/out/artifact.json")):
            found |= digests_of(seal, seal.parent.parent.name)
        return found


def digests_of(seal: Path, variant: str) -> dict[str, str]:
    """Return the sha256 of the files of an output that its recipe decides to the byte."""
    files = json.loads(seal.read_text(encoding="utf-8"))["files"]
    return {f"{variant}/{name}": each["sha256"] for name, each in files.items() if name.startswith(COMPARED)}


def start(recipe: Path, out: Path, home: Path, *options: str) -> subprocess.Popen[str]:
    """Start `optikit sweep`."""
    command = [
        sys.executable,
        "-m",
        "optikit",
        "sweep",
        str(recipe),
        "--out",
        str(out),
        "--progress",
        "plain",
        *options,
    ]
    environ = os.environ | {"OPTIKIT_HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=out.parent)


def finish(process: subprocess.Popen[str], out: Path, began: float) -> Swept:
    """Wait for a sweep and read what it left."""
    code = process.wait()
    log = out.with_suffix(".log").read_text(encoding="utf-8")
    path = out / "sweep.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"variants": []}
    return Swept(out=out, seconds=time.monotonic() - began, code=code, result=result, log=log)


def in_turn(recipe: Path, work: Path, *options: str) -> Swept:
    """Sweep without Ray, in a store of its own."""
    began = time.monotonic()
    return finish(start(recipe, work / "turn", work / "store-turn", *options), work / "turn", began)


def on_nodes(
    recipe: Path, work: Path, name: str, *options: str, cpus: int = 1, kill: bool = False, block: int = 2
) -> Swept:
    """Sweep on two nodes; with `kill`, one of them dies while a step of it is at a block."""
    place = work / name
    place.mkdir()
    with two_nodes(place, work / f"store-{name}", cpus=cpus) as (address, head, worker):
        began, out = time.monotonic(), work / f"swept-{name}"
        process = start(recipe, out, head.home, "--address", address, "--cpus", str(cpus), *options)
        killed = kill_within_a_walk(worker, out, process, block) if kill else []
        found = finish(process, out, began)
        found.killed = killed
        return found


def kill_within_a_walk(worker: Node, out: Path, process: subprocess.Popen[str], block: int) -> list[str]:
    """Kill a node when a run of it has done some blocks of a step."""
    while process.poll() is None:
        for recipe in worker.runs():
            log = Path(recipe).with_name("run.log")
            lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
            events = [json.loads(line) for line in lines if line.startswith('{"event"')]
            done = [each["done"] for each in events if each["event"] == "update" and each["what"] == "block"]
            if done and done[-1] >= block and events[-1]["event"] == "update":
                told = [f"{datetime.now(UTC).isoformat(timespec='milliseconds')} kill -9 of node {worker.name}"]
                told.append(f"{Path(recipe).parent.name} had told {done[-1]} blocks of {events[-1]['name']}")
                return [*told, *worker.kill()]
        time.sleep(0.02)
    return []


@dataclass(frozen=True)
class Alone:
    """A variant that was run by itself: how long it took, and what it made."""

    seconds: float
    digests: dict[str, str]


def separately(swept: Swept, recipe: Path, work: Path) -> dict[str, Alone]:
    """Run each variant by itself, each in a new store, as without a sweep; return them by name."""
    found = {}
    for path in sorted(swept.out.glob("variants/*/recipe.yaml")):
        name, home, out, began = path.parent.name, work / "store-alone", work / "alone", time.monotonic()
        shutil.rmtree(home, ignore_errors=True)
        command = [sys.executable, "-m", "optikit", "run", str(path), "--base", str(recipe.parent)]
        command += ["--out", str(out), "--progress", "none"]
        subprocess.run(command, check=True, env=os.environ | {"OPTIKIT_HOME": str(home)}, stdout=subprocess.DEVNULL)
        found[name] = Alone(seconds=time.monotonic() - began, digests=digests_of(out / "artifact.json", name))
        shutil.rmtree(out)
    return found


def page(nodes: Swept, killed: Swept, alone: dict[str, Alone], recipe: Path) -> str:
    """Return the record as Markdown."""
    from optikit import host

    machine, total = host.describe(), sum(each.seconds for each in alone.values())
    date = datetime.now(UTC).strftime("%d %B %Y").lstrip("0")
    blocks = killed.blocks()
    lost = max((max(0, before - found) for _, before, found in blocks), default=0)
    rows = [
        ("12 separate runs, summed", total, "1", "–"),
        ("on two Ray nodes", nodes.seconds, f"{nodes.seconds / total:.2f}", _made(nodes)),
        ("on two Ray nodes, one killed", killed.seconds, f"{killed.seconds / total:.2f}", _made(killed)),
    ]
    table = [f"| {what} | {seconds:.1f} | {share} | {made} |" for what, seconds, share, made in rows]
    expected = {name: digest for each in alone.values() for name, digest in each.digests.items()}
    same = expected == nodes.digests() == killed.digests()
    once = all(max(each.executed().values()) == 1 for each in (nodes, killed))
    again = sum(count - 1 for count in _starts(killed).values())
    return "\n".join(
        [
            "# A sweep on two nodes, recorded",
            "",
            f"`python tests/benchmarks/sweep_nodes.py`, commit {commit()}, {date}.",
            f"{machine['cpu']}, {machine['threads']} threads; Ray {metadata.version('ray')}: 2 nodes of a processor",
            "each on this machine, with folders and views of the store of their own. [sweep.html](sweep.html) is",
            "what the sweep on two nodes wrote, [kill.log](kill.log) what was killed and how it went on.",
            "",
            f"```yaml\n{recipe.read_text(encoding='utf-8')}```",
            "",
            "```sh",
            "ray start --head --port=PORT --num-cpus=1 --temp-dir=DIR-A         # OPTIKIT_HOME=VIEW-A",
            "ray start --address=HOST:PORT --num-cpus=1 --temp-dir=DIR-B        # OPTIKIT_HOME=VIEW-B",
            "optikit sweep recipe.yaml --address HOST:PORT --cpus 1 --out sweep/",
            "```",
            "",
            "| 12 recipes, 2 prefixes | seconds | of the separate runs | steps made / distinct steps |",
            "|---|---:|---:|---:|",
            *table,
            "",
            f"- Same sha256 in separate runs, on nodes, with one killed: {_yes(same)}, {len(expected)} files.",
            f"- No step was made twice: {_yes(once)}.",
            f"- Blocks of a walk lost by the kill: {lost} ({_told(blocks)}).",
            f"- Runs that were begun again on the other node: {again}.",
            "",
            "Separate runs have both processors and a new store each. Interpreter and libraries take most of each",
            "process, as the model is tiny.",
            "",
        ]
    )


def _made(swept: Swept) -> str:
    made = swept.executed()
    return f"{sum(made.values())} / {len(made)}"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _told(blocks: list[tuple[str, int, int]]) -> str:
    return "; ".join(f"{name}: {before} told before, {found} found by the next" for name, before, found in blocks)


def _starts(swept: Swept) -> Counter[str]:
    """Return how often each variant's run began."""
    return Counter(variant for variant, event in swept.events() if event["event"] == "plan")


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64)
    asked = parser.parse_args()
    work = asked.work
    shutil.rmtree(work, ignore_errors=True)
    recipe = prepare(work, layers=asked.layers, samples=asked.samples, windows=(32, 48, 64, 80, 96, 112))
    killed = on_nodes(recipe, work, "k", kill=True)
    nodes = on_nodes(recipe, work, "n")
    alone = separately(nodes, recipe, work)
    text = page(nodes, killed, alone, recipe)
    print(text)
    if asked.write:
        asked.write.mkdir(parents=True, exist_ok=True)
        (asked.write / "README.md").write_text(text, encoding="utf-8")
        told = "\n".join([*killed.killed, "", killed.log]).replace(str(work), "WORK").replace(sys.prefix, "VENV")
        (asked.write / "kill.log").write_text(told, encoding="utf-8")
        for name in ("sweep.html", "sweep.json"):
            shown = (nodes.out / name).read_text(encoding="utf-8").replace(str(work), "WORK")
            (asked.write / name).write_text(shown, encoding="utf-8")


if __name__ == "__main__":
    main()
