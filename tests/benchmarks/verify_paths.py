"""T(m) of every path that could check m drafted tokens, and the floor that the memory's bandwidth sets.

    python tests/benchmarks/verify_paths.py --path own=DIR --path int8=DIR --path own-b128=DIR --path torch-bf16=DENSE \
        --rounds 20 --svg examples/verify_paths.svg

DIR is what `compile: {engine: onnxruntime, verify: int8}` wrote. Every path is a process of its own that loads one
model; all of them run a window of m tokens behind the same context in turns, there and back again, and those that wait
are stopped. Times are wall time, medians over rounds with 95 % intervals (bootstrap), and the least; the processor time
beside them tells what others on the machine took. The floor is the bytes of the weights over the measured bandwidth.

Names of paths: `own…` is the first graph, `int8` the second one, `torch-bf16` transformers' kernels on a dense model,
`openvino…` a directory of `compile: {engine: openvino}`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)
CONTEXT = 200


def onnx_path(directory: Path, threads: int, name: str) -> Any:
    """Load a compiled directory; with the first graph alone, or with the second one for any number of tokens."""
    from dataclasses import replace

    from optikit.runtime.decoders import onnxruntime as module

    if name.startswith("own"):
        read = module.read_layout
        module.read_layout = lambda where: replace(read(where), verify=None)
    decoder = module.OnnxDecoder(directory, threads=threads, max_tokens=CONTEXT + 64)
    if not name.startswith("own"):
        decoder.single("verify")
    return decoder


def other_path(directory: Path, threads: int, name: str) -> Any:
    """Load the dense model in torch, bfloat16."""
    from optikit.runtime.decoders.transformers import TorchDecoder

    return TorchDecoder(directory, dtype="bfloat16", threads=threads, max_tokens=CONTEXT + 64)


def openvino_path(directory: Path, threads: int, name: str) -> Any:
    """Load a directory of `compile: {engine: openvino}`; at the precision that the plugin chooses."""
    from optikit.runtime.decoders.openvino import OpenVinoDecoder

    return OpenVinoDecoder(directory, threads=threads, max_tokens=CONTEXT + 64)


def serve(name: str, directory: Path, threads: int) -> None:
    """Load a path, then answer each m with wall and processor seconds of one window."""
    import numpy as np

    kind = name.partition("-")[0]
    load = {"own": onnx_path, "int8": onnx_path, "torch": other_path}.get(kind, openvino_path)
    decoder = load(directory, threads, name)
    context = np.arange(CONTEXT) % 97 + 5
    decoder.forward(context, 0, 1)
    print("ready", flush=True)
    for line in sys.stdin:
        m = int(line)
        tokens = np.arange(m) % 89 + 7
        for _ in range(3):  # the first finds its caches cold, as no decoding loop does
            before, wall = time.process_time(), time.perf_counter()
            decoder.forward(tokens, CONTEXT)
            took = time.perf_counter() - wall, time.process_time() - before
        print(json.dumps(took), flush=True)


class Arm:
    """A path in its process; stopped while others run."""

    def __init__(self, name: str, directory: Path, threads: int) -> None:
        self.name = name
        command = [sys.executable, __file__, "--serve", name, str(directory), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{name} doesn't load")
        os.kill(self.process.pid, signal.SIGSTOP)

    def ask(self, m: int) -> tuple[float, float]:
        """Return wall and processor milliseconds of a window of m tokens."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{m}\n")
        self.process.stdin.flush()
        wall, own = json.loads(self.process.stdout.readline())
        os.kill(self.process.pid, signal.SIGSTOP)
        return wall * 1000, own * 1000

    def close(self) -> None:
        """End the process."""
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.kill()
        self.process.wait()


def bandwidth(threads: int) -> float:
    """Return bytes per second of threads that sum 256 MiB each, the best of ten."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    data = [np.ones(1 << 25, np.float64) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(np.sum, data))
            best = min(best, time.perf_counter() - start)
    return sum(each.nbytes for each in data) / best


def draw(figures: dict[str, Any], floor_ms: float, path: Path) -> None:
    """Write the curves of all paths as a picture that stands alone, with the floor."""
    import re

    import optikit.report
    from optikit.report.load_curves import Curve, curves

    lines = [
        Curve(name=name, points=tuple((m, by[m]["ms"], tuple(by[m]["ci95"])) for m in WINDOWS))
        for name, by in figures.items()
    ]
    lines.append(Curve(name="bandwidth floor", points=tuple((m, floor_ms, None) for m in WINDOWS)))
    about = f"Milliseconds of a forward pass of m tokens behind {CONTEXT}, and what reading the weights once takes."
    drawn = curves(lines, ident="paths", title="T(m)", across="tokens m", up="ms", description=about)
    sheet = (Path(optikit.report.__file__).parent / "style.css").read_text(encoding="utf-8")
    colors = dict(reversed(re.findall(r"--([a-z-]+): (#[0-9a-f]+)", sheet)))  # the first of each: the light ones
    rules = "\n".join(re.findall(r"^svg .*$", sheet, re.MULTILINE)).replace("svg.chart", "svg")
    rules = re.sub(r"var\(--([a-z-]+)\)", lambda found: colors[found[1]], rules)
    style = (
        f'<style>svg text {{ font-family: sans-serif }}\n{rules}</style><rect width="100%" height="100%" fill="#fff"/>'
    )
    text = (
        str(drawn)
        .replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        .replace("<title", style + "<title", 1)
    )
    path.write_text(text + "\n", encoding="utf-8")


def measure(paths: list[Arm], rounds: int) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Return (wall, processor) milliseconds of every path and window, by round."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {p.name: {m: [] for m in WINDOWS} for p in paths}
    for number in range(rounds + 1):
        for path in paths if number % 2 else reversed(paths):
            for m in WINDOWS:
                took = path.ask(m)
                if number:
                    found[path.name][m].append(took)
    return found


def told(found: dict[str, dict[int, list[tuple[float, float]]]], reference: str) -> tuple[str, dict[str, Any]]:
    """Return a table, and its figures."""
    import numpy as np

    draw = np.random.default_rng(0)
    one = float(np.median([wall for wall, _ in found[reference][1]]))
    lines = [f"| path | {' | '.join(f'T({m})' for m in WINDOWS)} | T(4) | T(8) |", "|---" * (len(WINDOWS) + 3) + "|"]
    figures: dict[str, Any] = {}
    for name, by in found.items():
        cells, own = [], {}
        for m in WINDOWS:
            walls = np.array(by[m])[:, 0]
            resampled = np.median(draw.choice(walls, (2000, len(walls))), axis=1)
            low, high = np.percentile(resampled, (2.5, 97.5))
            middle, processor = float(np.median(walls)), float(np.median(np.array(by[m])[:, 1]))
            least = float(walls.min())
            own[m] = {"ms": middle, "ci95": [float(low), float(high)], "least_ms": least, "processor_ms": processor}
            cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f}); {least:.2f}; {processor:.2f}")
        ratios = [
            f"{np.median([a[0] / b[0] for a, b in zip(by[m], found[reference][1], strict=True)]):.2f}×" for m in (4, 8)
        ]
        figures[name] = own
        lines.append(f"| {name} | {' | '.join(cells)} | {' | '.join(ratios)} |")
    return "\n".join(lines), figures | {"reference_ms": one}


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", action="append", default=[], metavar="NAME=DIR", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    given = parser.parse_args()
    paths = []
    for each in given.path:
        name, _, directory = each.partition("=")
        paths.append(Arm(name, Path(directory), given.threads))
    try:
        found = measure(paths, given.rounds)
    finally:
        for path in paths:
            path.close()
    table, figures = told(found, "own")
    print(table)
    speed = bandwidth(given.threads)
    read = sum(each.stat().st_size for each in Path(given.path[0].partition("=")[2]).glob("model.onnx*"))
    floor_ms = 1000 * read / speed
    print(f"bandwidth of {given.threads} threads: {speed / 1e9:.1f} GB/s; {read / 1e6:.1f} MB take {floor_ms:.2f} ms")
    if given.svg:
        draw({name: by for name, by in figures.items() if name != "reference_ms"}, floor_ms, given.svg)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
