"""Run shipped recipes and record what they reported: examples/NAME/ gets the reports and a README that says how.

    python tests/benchmarks/record.py quickstart smollm2-135m-awq-cpu --work WORK

Recipes run one after another, so that they don't disturb each other; leave the machine alone meanwhile. The store in
WORK is empty at the start unless it is used again: then steps that recipes share are made once, and a report tells
which were. Whatever the recipe's verdict is, it is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KEPT = ("report.json", "report.md", "report.html")


def git(*arguments: str) -> str:
    """Return what git says of the repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """Return the short hash of the commit that is checked out, marked where files outside examples differ from it."""
    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", ":!examples") else "")


def machine(report: dict[str, Any]) -> str:
    """Return one sentence on the hardware and one on the versions."""
    found = report["host"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report["versions"].items()))
    flags = ", ".join(found["isa"])
    memory = found["memory_bytes"] / 2**30
    return (
        f"Machine: {found['cpu']} ({flags}), {found['threads']} threads, {memory:.0f} GiB, {found['system']}.\n"
        f"Versions: Python {found['python']}, {versions}."
    )


def readme(name: str, report: dict[str, Any], settings: list[str], seconds: float) -> str:
    """Return the README of a recorded run."""
    overrides = "".join(f" --set {shlex.quote(setting)}" for setting in settings)
    date = datetime.now(UTC).strftime("%d %B %Y").lstrip("0")
    return (
        f"# {name}, recorded\n\n"
        f"```sh\noptikit run recipes/{name}.yaml --out out/{overrides}\n```\n\n"
        f"Commit {commit()}, {date}: {seconds:.0f} s, verdict **{report['verdict']}**. `report.json`, `report.md` and\n"
        f"`report.html` are as the run wrote them.\n\n{machine(report)}\n"
    )


def record(name: str, settings: list[str], work: Path) -> str:
    """Run one recipe and keep its reports; return its verdict."""
    # The report quotes the command: it runs where it reads as a user's would.
    place = work / name
    place.mkdir(exist_ok=True)
    if not (place / "recipes").exists():
        (place / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    out = place / "out"
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "optikit", "run", f"recipes/{name}.yaml", "--out", "out/", *overrides]
    started = time.monotonic()
    done = subprocess.run(command, cwd=place, env={**os.environ, "OPTIKIT_HOME": str(work / "home")}, check=False)
    if not (out / "report.json").is_file():
        return f"no report, exit code {done.returncode}"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    kept = ROOT / "examples" / name
    kept.mkdir(exist_ok=True)
    for file in KEPT:
        shutil.copyfile(out / file, kept / file)
    (kept / "README.md").write_text(readme(name, report, settings, time.monotonic() - started), encoding="utf-8")
    return str(report["verdict"])


def main() -> None:
    """Record the recipes that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="names of recipes, without .yaml")
    parser.add_argument("--work", type=Path, required=True, help="directory for the store and the outputs")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="KEY=VALUE for every recipe")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    verdicts = {name: record(name, args.settings, args.work.resolve()) for name in args.recipes}
    print(json.dumps(verdicts, indent=1))


if __name__ == "__main__":
    main()
