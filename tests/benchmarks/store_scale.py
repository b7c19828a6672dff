"""A store of many artifacts: how long `plan`, `cache list` and `cache gc` take, each in a process of its own.

    python tests/benchmarks/store_scale.py --work WORK --count 10000 --write examples/store_scale.md

The artifacts are small, staged and committed by the store's own code; downloads and half-done work of the same number
are left out, for their directories are few. WORK/store is used again where it has enough of them. Every command runs
`--rounds` times, and the median counts; `gc` collects a hundredth of the store each time, so that what it measures is a
collection. What is read of the files comes from the kernel's cache, as it does on a machine that runs recipes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from optikit import host
from optikit.store import maintenance
from optikit.store.store import Manifest, Store, cache_key
from tests.benchmarks.record import commit

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
GOALS = {"plan": 1.0, "cache list": 2.0, "cache list --json": 2.0, "cache gc": 10.0, "cache gc --max-size": 10.0}
"""Seconds."""


def fill(store: Store, count: int) -> float:
    """Make artifacts until there are `count` of them; return the seconds that took."""
    started = time.monotonic()
    for number in range(len(store.keys()), count):
        key = cache_key(number=number, what="an artifact of a store with many")
        directory = store.staging(key)
        (directory / "config.json").write_text(json.dumps({"number": number}))
        (directory / "model.safetensors").write_bytes(number.to_bytes(8, "little") * 256)
        method = ("gptq", "awq", "rtn")[number % 3]
        store.commit(key, directory, Manifest(verb="quantize", method=method, seconds=float(number % 600)))
    return time.monotonic() - started


def seconds(home: Path, *arguments: str) -> tuple[float, float]:
    """Run a verb on a store; return its wall time and its processor time."""
    environment = {**os.environ, "OPTIKIT_HOME": str(home), "PYTHONPYCACHEPREFIX": str(home.parent / "pycache")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its byte code
    started = time.monotonic()
    command = [sys.executable, "-m", "optikit", *arguments]
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
    wall = time.monotonic() - started
    return wall, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before


def measure(store: Store, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the times of every command: wall, processor."""
    home = store.root
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in GOALS}
    seconds(home, "plan", str(RECIPE))  # its downloads
    for _ in range(rounds):
        found["plan"].append(seconds(home, "plan", str(RECIPE)))
        found["cache list"].append(seconds(home, "cache", "list"))
        found["cache list --json"].append(seconds(home, "cache", "list", "--json"))
        found["cache gc"].append(seconds(home, "cache", "gc"))
        size = sum(entry.size_bytes for entry in maintenance.entries(store))
        limit = f"{int(size * 0.99)}B"
        found["cache gc --max-size"].append(seconds(home, "cache", "gc", "--max-size", limit))
        print(json.dumps({name: times[-1] for name, times in found.items()}), file=sys.stderr, flush=True)
    return found


def page(count: int, filling: float, found: dict[str, list[tuple[float, float]]]) -> str:
    """Return the record as Markdown."""
    rows = ""
    for name, times in found.items():
        wall, cpu = ([each[column] for each in times] for column in (0, 1))
        middle = f"{statistics.median(wall):.2f} | {min(wall):.2f}–{max(wall):.2f} | {statistics.median(cpu):.2f}"
        rows += f"| `{name}` | {middle} | {GOALS[name]:g} |\n"
    made = (
        f" Making them took {filling:.0f} s, {filling / count * 1e3:.1f} ms each with their fsyncs." if filling else ""
    )
    return (
        f"# A store of {count:,} artifacts\n\n"
        f"```sh\npython tests/benchmarks/store_scale.py --work WORK --count {count}\n```\n\n"
        f"Commit {commit()}. {host.cpu_model()}, {host.threads()} threads, load {os.getloadavg()[0]:.1f} at the end.\n"
        f"Whole commands, start-up included, {len(found['plan'])} rounds; `--max-size` collects a hundredth of the\n"
        f"store. Other work on the machine lengthens wall times; the processor time is the command's own.{made}\n\n"
        f"| command | wall s, median | range | processor s | goal s |\n|---|---|---|---|---|\n{rows}"
    )


def main() -> None:
    """Fill a store, measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the store")
    parser.add_argument("--count", type=int, default=10_000, help="artifacts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="Markdown file to write the record to")
    args = parser.parse_args()
    store = Store(args.work.resolve() / "store")
    filling = fill(store, args.count)
    text = page(args.count, filling, measure(store, args.rounds))
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
