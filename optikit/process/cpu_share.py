"""A share of this machine's processors that no other share has meanwhile, so that one doesn't slow another's timing.

Every processor has a file, and whoever uses it holds that file's lock, so shares of several programs know of each other
and the kernel ends one with its holder.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

WAIT_SECONDS = 60.0
"""After that a share takes processors that others have, too: whoever handed it out counted otherwise."""
POLL_SECONDS = 0.2


@contextmanager
def share(count: int | None, *, wait_s: float = WAIT_SECONDS) -> Iterator[tuple[int, ...]]:
    """Run on `count` processors of one's own while the block lasts, and let children do so; None is all there are."""
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    there = sorted(os.sched_getaffinity(0))
    if count is None or count >= len(there):
        yield tuple(there)
        return
    with ExitStack() as held:
        mine = _free(there, count, held, wait_s)
        os.sched_setaffinity(0, mine)
        try:
            yield mine
        finally:
            os.sched_setaffinity(0, there)


def _free(there: list[int], count: int, held: ExitStack, wait_s: float) -> tuple[int, ...]:
    """Return processors whose files are locked now, and stay so until `held` is closed."""
    directory = Path(tempfile.gettempdir()) / f"optikit-processors-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    deadline = time.monotonic() + wait_s
    while True:
        with ExitStack() as taken:
            found = list(islice((each for each in there if _locked(directory / str(each), taken)), count))
            if len(found) == count:
                held.enter_context(taken.pop_all())
                return tuple(found)
        if time.monotonic() > deadline:
            return tuple(there[:count])
        time.sleep(POLL_SECONDS)


def _locked(path: Path, taken: ExitStack) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    taken.callback(os.close, descriptor)
    return True
