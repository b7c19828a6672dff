"""A short measurement of this machine: how fast it reads memory and multiplies matrices.

`optikit doctor --calibrate` runs this module (torch, in a child process, some seconds) and keeps the result beside the
store; estimates read it with `measured`. A result from another processor or thread count isn't used.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from optikit import host
from optikit.fileio import read_regular


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What this machine reached.

    Attributes:
        cpu, threads: Which machine.
        bandwidth_gb_s: Bytes read and written per second, 10⁹, by a float32 matrix-vector product (what decoding one
            token does) or a copy, whichever was faster.
        fp32_tflops: Float32 matrix product, 10¹² operations per second.
        bf16_tflops: The same in bf16.
        unix_time: When it was measured.
        load: Other work on the machine just before, in running processes per thread: above about 0.3 the figures are
            too low, and floors made of them aren't floors.
    """

    cpu: str
    threads: int
    bandwidth_gb_s: float
    fp32_tflops: float
    bf16_tflops: float
    unix_time: float
    load: float

    @property
    def quiet(self) -> bool:
        """Whether the machine had little else to do."""
        return self.load < 0.3


def path() -> Path:
    """Return the file that keeps the result, in the store's directory; looking doesn't make a store."""
    home = os.environ.get("OPTIKIT_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(home) if home else Path(cache) / "optikit"
    return Path(os.path.expanduser(directory)) / "calibration.json"  # noqa: PTH111 - without a home, "~" stays as it is


def measured(file: Path | None = None) -> Probe | None:
    """Return what was measured on this machine, or None if nothing was, or on another one."""
    file = file or path()
    try:
        probe = Probe(**json.loads(read_regular(file)))
    except (OSError, ValueError, TypeError):
        return None
    return probe if (probe.cpu, probe.threads) == (host.cpu_model(), host.threads()) else None


def keep(probe: Probe, file: Path | None = None) -> None:
    """Keep a measurement, so that a reader sees all of it or what was there before."""
    file = file or path()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(asdict(probe), indent=1), encoding="utf-8")
    part.replace(file)


def _best(work: Callable[[], object], *, seconds: float = 1.5, at_least: int = 3) -> float:
    """Return the shortest time of a call, repeated for some time: load only ever makes it longer."""
    work()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < deadline:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _measure() -> Probe:
    """Measure, in this process."""
    import torch

    load = os.getloadavg()[0] / host.threads()
    torch.set_num_threads(host.threads())
    size = 8192  # 268 MB of float32: more than any cache
    matrix, vector, other = torch.ones(size, size), torch.ones(size), torch.empty(size, size)
    product = 4 * size * size / _best(lambda: torch.mv(matrix, vector))
    copy = 8 * size * size / _best(lambda: other.copy_(matrix))

    def rate(dtype: torch.dtype) -> float:
        square = torch.ones(1024, 1024, dtype=dtype)
        return 2 * 1024**3 / _best(lambda: torch.mm(square, square))

    return Probe(
        cpu=host.cpu_model(),
        threads=host.threads(),
        bandwidth_gb_s=max(product, copy) / 1e9,
        fp32_tflops=rate(torch.float32) / 1e12,
        bf16_tflops=rate(torch.bfloat16) / 1e12,
        unix_time=time.time(),
        load=load,
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_measure())))
