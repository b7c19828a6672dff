"""A step's process: started in a session of its own, watched, ended with everything that it started.

What it prints is kept in a log of bounded size. How it died has a name: a signal, no memory, too much time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import OptikitError, OutOfMemoryError, StageFailedError, StageTimeoutError

if TYPE_CHECKING:
    from optikit import environments

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""How long an interrupted step may take to end by itself before it is killed."""
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_")
"""What torchrun tells its processes: a step that we start is none of them, or gets its own."""
MOST_LOG_BYTES = 64 * 2**20
"""Beyond this a log is begun anew: a library that prints in a loop must not fill the disk."""
LOG_TAIL_BYTES = 4096
"""How much of a dead process's log is searched for a cause."""


def respond(
    name: str,
    directory: Path,
    *,
    timeout: float | None,
    observe: Callable[[int, int, str], None],
    environment: environments.Environment | None = None,
) -> dict[str, Any]:
    """Do the work that `directory` asks for in a process of its own, and return what that answered.

    Args:
        name: Of the step, for messages.
        directory: Has request.json; log, events and response are written beside it.
        timeout: Seconds that it may take; None is as long as it wants.
        observe: Told (done, total, what) as the work goes on.
        environment: Whose interpreter does it; None is this one's.

    Raises:
        StageTimeoutError: It took longer.
        OutOfMemoryError: It was killed, or ran out of memory.
        StageFailedError: It died otherwise, without an answer.
    """
    request = json.loads((directory / "request.json").read_text(encoding="utf-8"))
    events = _Events(directory / "events.jsonl")
    started = time.monotonic()
    kills = _oom_kills()
    with _spawned(directory, request, environment) as child:
        while child.poll() is None:
            for event in events.new():
                observe(event["done"], event["total"], event["what"])
            _bound(directory / "log.txt")
            if timeout is not None and time.monotonic() - started > timeout:
                fix = "raise `timeout:` in the recipe, or run again: finished blocks are kept"
                raise StageTimeoutError(f"{name}: took longer than {timeout:g} s", fix=fix)
            time.sleep(POLL_SECONDS)
    response = directory / "response.json"
    if response.exists():
        loaded: dict[str, Any] = json.loads(response.read_text(encoding="utf-8"))
        return loaded
    raise _death(name, child.returncode, directory / "log.txt", oom=_oom_kills() > kills)


def _environment(threads: int) -> dict[str, str]:
    """Return the child's environment: no hub access, no secrets, a fixed number of threads."""
    secret = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "AWS_", "_KEY")
    kept = {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in secret)}
    kept = {name: value for name, value in kept.items() if not name.startswith(("TORCHELASTIC_", *TORCHRUN))}
    count = str(threads)
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "PYTHONHASHSEED": "0",
    }


@contextmanager
def _spawned(
    directory: Path, request: Mapping[str, Any], environment: environments.Environment | None
) -> Iterator[subprocess.Popen[bytes]]:
    python, variables = Path(sys.executable), _environment(request["threads"])
    if environment is not None:
        python, variables = environment.python, environment.variables(variables, directory)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request['ranks']}"]
    command = [str(python), *(launcher if request["ranks"] > 1 else []), "-m", "optikit.worker", str(directory)]
    with (directory / "log.txt").open("ab") as log:  # appended to, so that it can be begun anew meanwhile
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child and everything it started: politely, then not."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        if child.poll() is None:
            _signal_group(child.pid, number)
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
    _signal_group(child.pid, signal.SIGKILL)  # grandchildren that outlived it


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _bound(log: Path) -> None:
    """Begin a log anew that has grown too large."""
    if log.stat().st_size > MOST_LOG_BYTES:
        os.truncate(log, 0)
        with log.open("ab") as file:
            file.write(f"(more than {MOST_LOG_BYTES >> 20} MiB before this were cut off)\n".encode())


class _Events:
    """Reads a JSON Lines file that another process appends to; a half-written last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete = file.read().rpartition(b"\n")[0]
        self._offset += len(complete) + 1 if complete else 0
        return [json.loads(line) for line in complete.splitlines()]


def _oom_kills() -> int:
    """Return how often the kernel killed a process of this control group for memory; 0 where it doesn't tell."""
    path = Path("/sys/fs/cgroup/memory.events")
    if not path.exists():
        return 0
    counts = dict(line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return int(counts.get("oom_kill", 0))


def _death(step: str, returncode: int, log: Path, *, oom: bool) -> OptikitError:
    """Return the error for a child that died without a response."""
    if -returncode == signal.SIGKILL:
        certain = "the kernel ended it for memory" if oom else "something ended it with SIGKILL, most often for memory"
        fix = "fewer or shorter calibration samples, or a machine with more memory"
        return OutOfMemoryError(f"{step}: {certain}", fix=fix)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return StageFailedError(f"{step}: its process crashed with {name}", fix=f"the log has more: {log}")
    tail = b""
    if log.exists():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            tail = file.read()
    if b"MemoryError" in tail:
        fix = "give the run more memory, or fewer calibration samples"
        return OutOfMemoryError(f"{step}: its process had no memory left to say so", fix=fix)
    return StageFailedError(f"{step}: its process ended with exit code {returncode} and no response", fix=f"see {log}")
