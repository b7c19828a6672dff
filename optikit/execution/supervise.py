"""A step's process: given its job's directory, watched, and ended with everything that it started.

How it died has a name: a signal, no memory, a full disk, too much time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.process import child, env_variables

if TYPE_CHECKING:
    from optikit import environments


def respond(
    name: str,
    directory: Path,
    *,
    timeout: float | None,
    observe: Callable[[int, int, str], None],
    note: Callable[[str], None] = lambda _: None,
    between: Callable[[], None] = lambda: None,
    environment: environments.Environment | None = None,
) -> dict[str, Any]:
    """Do the work that `directory` asks for in a process of its own, and return what that answered.

    Args:
        name: Of the step, for messages.
        directory: Has request.json; log, events and response are written beside it.
        timeout: Seconds that it may take; None is as long as it wants.
        observe: Told (done, total, what) as the work goes on.
        note: Told what the stage wants a user to know.
        between: Called twenty times a second; what it raises ends the process.
        environment: Whose interpreter does it; None is this one's.

    Raises:
        StageTimeoutError: It took longer.
        OutOfMemoryError: It was killed, or ran out of memory.
        DiskError: It had no room to answer.
        StageFailedError: It died otherwise, without an answer.
    """
    request = json.loads((directory / "request.json").read_text(encoding="utf-8"))
    events = child.NewLines(directory / "events.jsonl")

    def observe_events() -> None:
        between()
        for line in events.read():
            event = json.loads(line)
            if "note" in event:
                note(f"{name}: {event['note']}")
            else:
                observe(event["done"], event["total"], event["what"])

    python, environ = sys.executable, _environ(request["threads"])
    if environment is not None:
        python, environ = str(environment.python), environment.variables(environ, directory)
    command = _command(python, directory, request)
    late = "raise `timeout:` in the recipe, or run again: finished blocks are kept"
    with child.started(command, environ=environ, log=directory / "log.txt") as worker:
        worker.watch(name, seconds=timeout, between=observe_events, fix=late)
    response = directory / "response.json"
    loaded: dict[str, Any] = json.loads(response.read_text(encoding="utf-8")) if response.exists() else {}
    if environment is not None and not loaded.get("ok"):
        environment.require(name)  # was removed or damaged meanwhile: that is why
    if not loaded:
        raise worker.death(name)
    return loaded


def _command(python: str, directory: Path, request: Mapping[str, Any]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request['ranks']}"]
    return [python, *(launcher if request["ranks"] > 1 else []), "-m", "optikit.execution.worker", str(directory)]


def _environ(threads: int) -> dict[str, str]:
    """Return a worker's environment: no hub, no git, no credential, a fixed number of threads."""
    fixed = {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
    without = env_variables.OFFLINE | env_variables.NO_REPOSITORY
    return env_variables.kept() | without | env_variables.threads(threads) | fixed
