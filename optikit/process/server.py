"""A server that is kept no longer than it is wanted, with everything that it started."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from optikit.process import failure, launch
from optikit.process.child import Child, started

POLL_SECONDS = 0.5


@contextmanager
def running(
    what: str,
    command: Sequence[str],
    *,
    environ: Mapping[str, str],
    log: Path,
    answers: Callable[[], bool] = lambda: True,
    start_s: float = 0.0,
    directory: Path | None = None,
) -> Iterator[Child]:
    """Run a server until the block ends; it begins when the server answers. The child's group is all that it started.

    Args:
        what: The server, for messages.
        command: The server's.
        environ: Its environment.
        log: File for all that it prints, begun anew.
        answers: Tells whether it answers by now.
        start_s: Seconds that it may take until it does.
        directory: Where it runs; None is here.

    Raises:
        OptikitError: It ended instead of answering; see `failure.death`.
        StageTimeoutError: It didn't answer in time.
    """
    log.unlink(missing_ok=True)
    grace_s = launch.GRACE_SECONDS * 2  # its keeper is done before this
    with started(command, environ=environ, log=log, directory=directory, kept=True, grace_s=grace_s) as child:
        deadline = time.monotonic() + start_s
        while not answers():
            if child.code is not None:
                raise child.death(what)
            if time.monotonic() > deadline:
                fix = f"run again when the machine is less busy; the whole log is {log}"
                raise failure.no_answer(what, start_s, log, fix=fix)
            time.sleep(POLL_SECONDS)
        yield child
