"""Measure the perplexity of a model twice, as a whole and block by block: peak memory, time, and that it is the same.

Run (2 GB of disk; --layers 4 --width 512 takes seconds):

    python tests/benchmarks/streamed_quality.py --work DIR

A Llama with random weights is written as `bounded_memory.py` does. Each arm is a child process that runs the quality
step in float32 with its own `max_memory`. Peak is the kernel's VmHWM, libraries included; beside it the estimate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

path = Path(__file__).with_name("bounded_memory.py")
spec = importlib.util.spec_from_file_location("bounded_memory", path)
assert spec is not None
assert spec.loader is not None
bounded_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bounded_memory)

MIB = 2**20
CHILD = """
import json, sys, time
from pathlib import Path
request = json.loads(sys.argv[1])
from optikit.stage import Job
from optikit.stages.measure import quality
source, place = Path(request["source"]), Path(request["place"])
options = quality.Options(**request["options"])
inputs = {"text": Path(request["text"]), "tokenizer": source}
started = time.monotonic()
job = Job(source=source, dest=place / "dest", scratch=place / "scratch", inputs=inputs, threads=request["threads"],
          max_memory_bytes=request["limit"])
facts = quality.run(options, job)
status = Path("/proc/self/status").read_text()
peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024
value = facts["perplexity"]["value"]
print(json.dumps({"seconds": time.monotonic() - started, "peak_mib": peak, "perplexity": value}))
"""


def arm(source: Path, limit: int | None, wanted: argparse.Namespace) -> dict[str, Any]:
    """Measure in a child; return what it tells, and what was expected."""
    from optikit import targets
    from optikit.models.reader import read
    from optikit.stages.measure import quality

    place = wanted.work / "arm"
    shutil.rmtree(place, ignore_errors=True)
    (place / "dest").mkdir(parents=True)
    options = {"dtype": "float32", "window": wanted.window, "windows": wanted.windows}
    request = {"source": str(source), "place": str(place), "options": options, "limit": limit}
    request |= {"text": str(wanted.work / "text.txt"), "threads": wanted.threads}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(request)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(wanted.threads)},
    )
    target = targets.find("cpu")
    assert target is not None
    estimate = quality.estimate(quality.Options(**options), read(source), target, 0)
    fitted = estimate if limit is None else estimate.within(limit)
    return json.loads(ended.stdout.splitlines()[-1]) | {"expected": fitted.peak_bytes / MIB}


def main() -> None:
    """Write the model, measure it both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for model and results")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--limit-mib", type=int, default=1536)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    wanted = parser.parse_args()
    wanted.work.mkdir(parents=True, exist_ok=True)
    (wanted.work / "text.txt").write_text(f"{bounded_memory.WORDS}\n" * 2000)
    source = bounded_memory.write_model(wanted.work / "model", wanted.layers, wanted.width)
    print(
        f"{wanted.layers} layers, {wanted.width} wide, {bounded_memory.weight_bytes(source) / 1e9:.2f} GB of weights\n"
    )
    print("| read | max_memory | peak | expected | time | perplexity |")
    print("| :-- | --: | --: | --: | --: | --: |", flush=True)
    for name, limit in (("whole", None), ("by block", wanted.limit_mib * MIB)):
        found = arm(source, limit, wanted)
        bound = "–" if limit is None else f"{wanted.limit_mib} MiB"
        peaks = f"{found['peak_mib']:.0f} MiB | {found['expected']:.0f} MiB"
        print(f"| {name} | {bound} | {peaks} | {found['seconds']:.0f} s | {found['perplexity']:.6f} |", flush=True)


if __name__ == "__main__":
    main()
