"""A step's process: started in a session of its own, watched, ended with everything that it started.

What it prints is kept in a log of bounded size. How it died has a name: a signal, no memory, too much time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import StageTimeoutError
from optikit.process.child import _bound, _death, _oom_kills, _stop

if TYPE_CHECKING:
    from optikit import environments

POLL_SECONDS = 0.05
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_")
"""What torchrun tells its processes: a step that we start is none of them, or gets its own."""


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
    command = [
        str(python),
        *(launcher if request["ranks"] > 1 else []),
        "-m",
        "optikit.execution.worker",
        str(directory),
    ]
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
