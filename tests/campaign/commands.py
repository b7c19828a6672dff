"""One `optikit …` that runs, in a fresh interpreter or forked by a process that has imported it already."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANGS_S = 300.0
"""Seconds after which a command counts as hung: nothing here takes a minute on an idle machine."""
POLL_S = 0.002
BUG = ("has a bug", "Traceback (most recent call last)")
CONTROLS = {chr(code) for code in (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x202E, 0x2066, 0x2067, 0x200B)}


@dataclass(frozen=True)
class Done:
    """How a command ended; code None where it hung."""

    code: int | None
    out: str
    err: str

    def faults(self, allowed: Sequence[int]) -> list[str]:
        """Return what is wrong with the way it ended, whatever it was asked."""
        found = []
        if self.code is None:
            found.append("hung")
        elif self.code not in allowed:
            found.append(f"exit {self.code}")
        found += [f"says {text!r}" for text in BUG if text in self.err + self.out]
        shown = sorted(CONTROLS & set(self.err + self.out))
        found += [f"control characters {shown}"] if shown else []
        found += ["workflow command"] if any(line.startswith("::") for line in self.out.splitlines()) else []
        return [f"{each} | {self.last}" for each in found]

    @property
    def last(self) -> str:
        """Return the end of what it said."""
        return " / ".join((self.err or self.out).strip().splitlines()[-2:])[:300]


class Command:
    """A command that was started; `code` is None until `poll` or `finish` has seen its end."""

    def __init__(self, arguments: Sequence[str | Path], cwd: Path, environ: Mapping[str, str], *, cold: bool) -> None:
        self.code: int | None = None
        self._asking = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        out, err = Path(self._folder.name, "out"), Path(self._folder.name, "err")
        self._said = (out, err)
        self._forker = None if cold else _forker()
        if self._forker is None:
            command = [sys.executable, "-m", "optikit", *(str(each) for each in arguments)]
            with out.open("wb") as writing, err.open("wb") as errors:
                self._popen = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=writing,
                    stderr=errors,
                    cwd=cwd,
                    env=dict(environ),
                    start_new_session=True,
                )
            self.pid = self._popen.pid
        else:
            encoded = [os.fsencode(str(each)).hex() for each in arguments]
            places = {"cwd": str(cwd), "environ": dict(environ), "out": str(out), "err": str(err)}
            self.pid = self._forker.ask({"arguments": encoded, **places})

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        with self._asking:
            if self.code is None:
                self.code = self._popen.poll() if self._forker is None else self._forker.answer()
            return self.code

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def finish(self, seconds: float = HANGS_S) -> Done:
        """Wait for it; one that hangs is killed with all that it started."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < end:
            time.sleep(POLL_S)
        if code is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            while self.poll() is None:
                time.sleep(POLL_S)
        said = [path.read_text(encoding="utf-8", errors="backslashreplace") for path in self._said]
        self._folder.cleanup()
        return Done(code, *said)


class Forker:
    """A process that forks commands, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaign.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    def ask(self, request: Mapping[str, object]) -> int:
        """Fork a command; return its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return int(self._line())

    def answer(self) -> int | None:
        """Return the exit code of the command, once; None while it runs."""
        return int(self._line()) if select.select([self._process.stdout], [], [], 0)[0] else None

    def stop(self) -> None:
        """End it."""
        self._process.communicate()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


_MINE = threading.local()
_ALL: list[Forker] = []


def _forker() -> Forker:
    """Return the forking process of this thread, which does one case at a time."""
    if not hasattr(_MINE, "forker"):
        _MINE.forker = Forker()
        _ALL.append(_MINE.forker)
    found: Forker = _MINE.forker
    return found


def stop_forkers() -> None:
    """End the forking processes of all threads."""
    while _ALL:
        _ALL.pop().stop()
