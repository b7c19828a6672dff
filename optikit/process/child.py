"""A child process: started in a session of its own, tied to this one, watched, and ended with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from optikit.errors import OptikitError, StageTimeoutError
from optikit.process import env_variables, failure, launch, memory

if TYPE_CHECKING:
    import psutil

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""How long an interrupted child may take to end by itself before it is killed."""
MOST_LOG_BYTES = 64 * 2**20
"""Beyond this a log is begun anew: a library that prints in a loop must not fill the disk."""


class Child:
    """A process that `started` has begun.

    Attributes:
        log: What it prints; None where that is read from pipes.
    """

    def __init__(self, popen: subprocess.Popen[bytes], log: Path | None, *, kept: bool) -> None:
        self.log = log
        self._popen, self._kept, self._kills = popen, kept, memory.kills()

    @property
    def pid(self) -> int:
        """Its process id, which is that of its group, too."""
        return self._popen.pid

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._popen.poll()

    @property
    def input(self) -> IO[bytes]:
        """Pipe to its standard input.

        Raises:
            ValueError: It was started without pipes.
        """
        return _piped(self._popen.stdin)

    @property
    def output(self) -> IO[bytes]:
        """Pipe from its standard output.

        Raises:
            ValueError: It was started without pipes.
        """
        return _piped(self._popen.stdout)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.code is None:
            self._popen.send_signal(number)

    def watch(self, what: str, *, seconds: float | None = None, between: Callable[[], None], fix: str = "") -> int:
        """Wait until it ends, and keep its log bounded meanwhile; return its exit code.

        Args:
            what: It, for messages.
            seconds: How long it may take from now; None is as long as it wants.
            between: Called twenty times a second, and once more after its end.
            fix: What to do when it takes too long.

        Raises:
            StageTimeoutError: It took too long; it still runs.
        """
        started = time.monotonic()
        while self.code is None:
            between()
            self._bound_log()
            if seconds is not None and time.monotonic() - started > seconds:
                raise StageTimeoutError(f"{what}: took longer than {seconds:g} s", fix=fix)
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(POLL_SECONDS)
        between()
        return self._popen.wait()

    def finish(self, seconds: float | None = None) -> tuple[str, str]:
        """Close its input and wait until it ends; return what it wrote to its pipes, output and errors.

        Raises:
            TimeoutError: It took longer than `seconds`; it still runs.
        """
        started = time.monotonic()
        while seconds is None or time.monotonic() - started < seconds:
            self._bound_log()
            with suppress(subprocess.TimeoutExpired):  # what was read until then isn't lost
                out, err = self._popen.communicate(timeout=POLL_SECONDS)
                return out.decode("utf-8", "replace"), (err or b"").decode("utf-8", "replace")
        raise TimeoutError(f"took longer than {seconds:g} s")

    def death(self, what: str, *, fix: str = "") -> OptikitError:
        """Return the error for its end, which is waited for; see `failure.death`.

        Raises:
            ValueError: It has no log.
        """
        if self.log is None:
            raise ValueError("only a child with a log can be asked how it died")
        killed = memory.kills() > self._kills
        return failure.death(what, self._popen.wait(), self.log, for_memory=killed, fix=fix)

    def stop(self, grace_s: float = GRACE_SECONDS) -> None:
        """End it and everything that it started: politely, and what is left after `grace_s` not.

        Processes that left its group are found while their parents live. Its keeper, if it has one, is polite to it.
        """
        deadline = time.monotonic() + grace_s
        started = _descendants(self.pid) if self.code is None else []
        if self.code is None and grace_s > 0:
            self._ask_to_end()
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace_s)
        while any(_runs(each) for each in started) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        _signal_group(self.pid, signal.SIGKILL)
        self._popen.wait()
        for each in started:
            if _runs(each):
                each.kill()
        self._close_pipes()

    def _ask_to_end(self) -> None:
        if self._kept:
            self._close_pipes()
        else:
            _signal_group(self.pid, signal.SIGTERM)
            _signal_group(self.pid, signal.SIGCONT)  # one that is stopped reads no signal

    def _close_pipes(self) -> None:
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            with suppress(BrokenPipeError):  # what a dead child never read
                if pipe is not None:
                    pipe.close()

    def _bound_log(self) -> None:
        if self.log is None:
            return
        with self.log.open("ab") as log:
            launch.begin_anew(log.fileno(), MOST_LOG_BYTES)


@contextmanager
def started(
    command: Sequence[str],
    *,
    environ: Mapping[str, str] | None = None,
    log: Path | None = None,
    directory: Path | None = None,
    piped: bool = False,
    kept: bool = False,
    grace_s: float = GRACE_SECONDS,
) -> Iterator[Child]:
    """Start a child in a session of its own; when the block ends it is stopped, and so is everything it started.

    If this process dies, however it dies, so does the child: at once where it is `tied`, by its keeper where it is
    `kept`; see `launch`. The thread that starts a child has to live as long.

    Args:
        command: Program and arguments.
        environ: Its environment; None is what a child may see of this one's.
        log: File that gets what it prints, at its end, and stays bounded; with `piped` only what goes to its errors.
        directory: Where it runs; None is here.
        piped: Its input and output are pipes; without a log, its errors, too.
        kept: It starts other programs, which have to end with it: a keeper takes care of that.
        grace_s: Seconds it gets to end by itself when it is stopped; 0 is none.
    """
    if (log is None and not piped) or (kept and piped):
        raise ValueError("a child needs a log or pipes, and one with a keeper has no pipes")
    how = ["kept", str(MOST_LOG_BYTES)] if kept else ["tied", str(os.getpid())]
    sink = subprocess.PIPE if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        popen = subprocess.Popen(
            [sys.executable, "-I", "-S", launch.__file__, *how, *command],
            stdin=subprocess.PIPE if piped or kept else subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else sink,
            stderr=sink,
            env=env_variables.kept() if environ is None else dict(environ),
            cwd=directory,
            start_new_session=True,
        )
    finally:
        if log is not None:
            os.close(sink)
    child = Child(popen, log, kept=kept)
    try:
        yield child
    finally:
        child.stop(grace_s)


class NewLines:
    """Reads a file that another process appends to, line by line; a half-written last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[str]:
        """Return the lines that are complete and new since the last time; none while there is no file."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            self._offset = min(self._offset, file.seek(0, os.SEEK_END))  # it was begun anew
            file.seek(self._offset)
            complete, end, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(end)
        return complete.decode("utf-8", "replace").split("\n") if end else []


def is_alive(pid: int) -> bool:
    """Return whether there is a process of this id, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _piped(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("this child was started without pipes")
    return pipe


def _descendants(pid: int) -> list[psutil.Process]:
    import psutil

    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def _runs(process: psutil.Process) -> bool:
    """Return whether a process hasn't ended; one that nobody waited for has."""
    import psutil

    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)
