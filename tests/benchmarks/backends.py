"""The same recipe with `backend:` switched: time, memory, perplexity and size of every library that can do the stage.

    python tests/benchmarks/backends.py --out examples/backends

AutoAWQ needs about half a minute for a block of SmolLM2-135M on two cores: the whole takes half an hour with
environments that are built. Steps that an earlier run left in the store are taken from there, with the time that they
took.

Every arm is `optikit run` on a shipped recipe without its speed test: seconds and peak memory are what the runner
measured of the step's process, perplexity and size are what the report says. The table goes to README.md in the
directory.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from optikit import host

ROOT = Path(__file__).resolve().parents[2]
ARMS: dict[str, tuple[str, ...]] = {
    "smollm2-135m-llmcompressor-gptq-cpu": ("llm-compressor", "optikit"),
    "smollm2-135m-gptqmodel-gptq-cpu": ("gptqmodel",),
    "smollm2-135m-autoawq-cpu": ("autoawq", "optikit"),
}
"""Recipe → backends to run it with; options that only the library has are left to its defaults. Ours does GPTQ once."""
HEAD = (
    "method",
    "backend",
    "seconds",
    "peak MiB",
    "perplexity",
    "ratio to its source",
    "weights MB",
    "read differently",
)


def derived(recipe: str, backend: str) -> dict[str, Any]:
    """Return a shipped recipe for one arm: with a backend, without speed test and gates."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    found["stages"] = [{"quantize": dict(found["stages"][0]["quantize"], backend=backend)}]
    del found["evaluate"]["speed"], found["gates"]
    return found


def run(recipe: str, backend: str, work: Path, overrides: list[str]) -> dict[str, Any]:
    """Run a recipe with a backend and return its report."""
    work.mkdir()
    path, out = work / f"{recipe}.yaml", work / "out"
    path.write_text(yaml.safe_dump(derived(recipe, backend), sort_keys=False), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "optikit",
        "run",
        str(path),
        "--out",
        str(out),
        "--progress",
        "plain",
    ]
    done = subprocess.run([*command, *(part for each in overrides for part in ("--set", each))], check=False, cwd=ROOT)
    if not (out / "report.json").exists():
        sys.exit(f"{recipe} with {backend} ended with {done.returncode} and no report")
    loaded: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return loaded


def row(report: dict[str, Any]) -> tuple[str, ...]:
    """Return one line of the table."""
    step = next(step for step in report["steps"] if step["verb"] == "quantize")
    quality = step["measurement"]["quality"] if step["measurement"] else report["result"]["quality"]
    perplexity = (quality or {}).get("perplexity") or {}
    own = next((each for each in report["attribution"] if each["step"] == step["name"]), {})
    return (
        step["method"],
        step["backend"],
        f"{step['seconds']:.0f}",
        f"{step['peak_memory_mib']:.0f}",
        _number(perplexity.get("value"), 2),
        _number(own.get("perplexity_ratio", {}).get("value"), 3),
        _number(step["artifact_bytes"] / 1e6, 1),
        str(step["facts"].get("reader_mismatches", "")),
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def page(rows: list[tuple[str, ...]], overrides: list[str]) -> Iterator[str]:
    """Yield the lines of README.md."""
    changed = f" with `{' '.join(overrides)}`" if overrides else ""
    sets = "".join(f" --set {override}" for override in overrides)
    names = ", ".join(f"`recipes/{name}.yaml`" for name in ARMS)
    yield "# Backends: the same recipe, done by different libraries\n"
    yield f"    python tests/benchmarks/backends.py --out examples/backends{sets}\n"
    yield f"Recipes: {names}{changed}, quantizing SmolLM2-135M."
    yield "Every backend of a method sees the same calibration windows. Seconds and peak memory are of the quantizing"
    yield "step's process; perplexity is on the held-out text, its ratio against the model that was quantized. *Read"
    yield "differently* counts the weights for which the library's own reader and the next stage's disagree in any"
    yield "bit.\n"
    yield f"| {' | '.join(HEAD)} |"
    yield "|" + "---|" * len(HEAD)
    for cells in rows:
        yield f"| {' | '.join(cells)} |"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "onnxruntime"))
    yield f"\nMachine: {host.cpu_model()}, {host.threads()} threads, {platform.system()}; main environment: {versions}."


def main() -> None:
    """Run every arm and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    arms = [(recipe, backend) for recipe, backends in ARMS.items() for backend in backends]
    with tempfile.TemporaryDirectory() as work:
        reports = [run(*arm, Path(work) / "-".join(arm), arguments.overrides) for arm in arms]
    rows = [row(report) for report in reports]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "README.md").write_text("\n".join(page(rows, arguments.overrides)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
