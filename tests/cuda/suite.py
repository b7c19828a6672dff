"""Sections of work on a GPU, each in a process of its own and within its time; one table, and `cuda.json`.

    python -m tests.cuda.suite DIRECTORY --device cuda --seconds 460

A section that crashes, hangs or runs out of time keeps the rows that it has told. `cuda.json`:

    schema      1
    commit      of the working tree, "+" behind it where that had changes; "" without git
    device      asked for; name, capability, memory_mib, driver, cuda: of the GPU, null on the processor
    dry         true: small shapes, so that no figure says anything about a GPU
    versions    of the libraries
    seconds     all of it
    sections    name → {status: ok | failed | timeout | no time, seconds, error}
    rows        {section, name, status: ok | failed | skipped, seconds, device_memory_mib, error, …}, with
                stages      compared: whether facts and files are those that the processor finds, by name
                blocks      shape, tokens, block_seconds: of each block of a Llama of 8B's shape, but two blocks only
                packing     shape, gb_per_s: of weights read, packed and written; bytes_out
                windows     shape, weight_bytes, ms: T(m) by m behind 200 tokens; gb_per_s: of weights at m = 1
                loops       acceptance_length, exact_match: speculation against plain decoding on the device

Exit code 0 where every section and row is ok or skipped, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

from optikit import host
from optikit.environments import cuda
from optikit.fileio import write_json

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "onnxruntime", "triton")
LIMITS = {"blocks": 150, "windows": 90, "packing": 100, "stages": 180, "loops": 90}
"""Most seconds of each section, in the order in which they are done: what can't be had elsewhere comes first."""
SECONDS = 460.0
"""For all of them, where nothing else is asked for."""
LEAST = 15
"""Seconds that have to be left for a section to be begun."""
ROOT = Path(__file__).parents[2]


def section(name: str, directory: Path, device: str, seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Do a section; return how it went, and its rows."""
    if seconds < LEAST:
        return {"status": "no time", "seconds": 0.0, "error": ""}, []
    began, log = time.monotonic(), directory / f"{name}.log"
    command = [sys.executable, "-m", "tests.cuda.sections", name, str(directory / name), device]
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, start_new_session=True
        ) as child,
    ):
        timer = Timer(seconds, lambda: os.killpg(child.pid, signal.SIGKILL))
        timer.start()
        rows = list(_rows(child, name))
        code = child.wait()
        timer.cancel()
    took = time.monotonic() - began
    shutil.rmtree(directory / name, ignore_errors=True)
    status = "ok" if code == 0 else "timeout" if took >= seconds else "failed"
    error = "" if code == 0 else log.read_text(encoding="utf-8", errors="replace")[-2000:]
    return {"status": status, "seconds": round(took, 1), "error": error}, rows


def _rows(child: subprocess.Popen[str], name: str) -> Iterator[dict[str, Any]]:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            row = {"section": name, **json.loads(line)}
            print(" ".join(_cells(row)), flush=True)
            yield row


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    memory = row.get("device_memory_mib")
    told = {key: row[key] for key in TOLD if key in row}
    what = str(row.get("error") or "").strip().splitlines()
    return (
        f"{row['section']:<8}",
        f"{row['name']:<28}",
        f"{row['status']:<8}",
        f"{row['seconds']:>7.1f} s",
        f"{'' if memory is None else f'{memory:.0f} MiB':>11}",
        " ".join(f"{key}={value}" for key, value in told.items()) if not what else what[-1][:160],
    )


TOLD = ("compared", "block_seconds", "gb_per_s", "bytes_out", "ms", "acceptance_length", "exact_match")
"""Fields that the table shows."""


def about(device: str) -> dict[str, Any]:
    """Return the device as the result names it."""
    found: dict[str, Any] = dict.fromkeys(("name", "capability", "memory_mib", "driver", "cuda"))
    if device.startswith("cuda"):
        import torch

        known = torch.cuda.get_device_properties(0)
        driver = cuda.driver()
        found |= {"name": known.name, "capability": f"{known.major}.{known.minor}", "cuda": torch.version.cuda}
        found |= {"memory_mib": known.total_memory // 2**20, "driver": driver.version if driver else None}
    return {"asked": device, **found, "processor": host.cpu_model(), "threads": host.threads()}


def commit() -> str:
    """Return the commit of the working tree, with "+" where it has changes; "" where git doesn't say."""
    told = []
    for command in (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        except OSError:
            return ""
        told.append(done.stdout.strip() if done.returncode == 0 else "")
    return told[0] + "+" * bool(told[1]) if told[0] else ""


def run(out: Path, device: str, seconds: float) -> dict[str, Any]:
    """Do all sections; write and return the result, also after every one of them."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    result: dict[str, Any] = {"schema": 1, "commit": commit(), "device": about(device), "dry": device == "cpu"}
    result |= {"versions": {"python": platform.python_version(), **host.versions(LIBRARIES)}, "seconds": 0.0}
    result |= {"sections": {}, "rows": []}
    with tempfile.TemporaryDirectory() as directory:
        for name, limit in LIMITS.items():
            left = seconds - (time.monotonic() - began)
            allowed = min(limit * max(1.0, seconds / SECONDS), left)  # who gives more time, gives it to each
            result["sections"][name], rows = section(name, Path(directory), device, allowed)
            result["rows"] += rows
            result["seconds"] = round(time.monotonic() - began, 1)
            write_json(out / "cuda.json", result)
    (out / "table.txt").write_text(table(result) + "\n", encoding="utf-8")
    return result


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    device = result["device"]["name"] or "the processor, small shapes: no figure is a GPU's"
    lines = [f"{device} · torch {result['versions'].get('torch')} · commit {result['commit'][:12]}"]
    lines += [" ".join(_cells(row)) for row in result["rows"]]
    for name, each in result["sections"].items():
        last = (each["error"].strip().splitlines() or [""])[-1][:160]
        lines.append(f"section  {name:<28} {each['status']:<8} {each['seconds']:>7.1f} s {last}")
    lines.append(f"{len(result['rows'])} rows, {failures(result)} failed, {result['seconds']:.0f} s")
    return "\n".join(lines)


def failures(result: dict[str, Any]) -> int:
    """Return how many rows and sections failed."""
    rows = sum(row["status"] == "failed" for row in result["rows"])
    return rows + sum(each["status"] != "ok" for each in result["sections"].values())


def main() -> int:
    """Read the command line, do the work, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args()
    result = run(given.out, given.device, given.seconds)
    print(table(result))
    return 1 if failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())
