"""Named points at which a test makes this process fail for real. Does nothing unless OPTIKIT_TESTING=1.

`OPTIKIT_FAULT=before_rename:sigkill` kills the process at that point; `enospc` raises what a full disk raises there,
`nolock` what a file system without locks raises; `hang` says so on stderr and waits, so that a test can act on a
process that stands exactly there.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Literal

Point = Literal["before_write", "mid_write", "before_manifest", "before_rename", "after_rename", "lock"]


def reach(point: Point) -> None:
    """Fail here if the environment asks for it."""
    if os.environ.get("OPTIKIT_TESTING") != "1":
        return
    wanted, _, action = os.environ.get("OPTIKIT_FAULT", "").partition(":")
    if wanted != point:
        return
    if action == "sigkill":
        signal.raise_signal(signal.SIGKILL)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "nolock":
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    elif action == "hang":
        print(f"hanging {point}", file=sys.stderr, flush=True)  # noqa: T201  the signal to the waiting test
        signal.pause()
