"""optikit's command line, imported once and forked for every command: hundreds of commands in the time of a few.

Each command is a process of its own, with the exit code, output and errors that a new interpreter would give.

    python -m tests.campaign.warm     reads {"arguments", "cwd", "environ", "out", "err", "seconds"} per line
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.campaign.figures import JOBS
from tests.campaign.world import HANGS_S, Done, environment

IMPORTED = (
    "optikit.app.run",
    "optikit.app.recommend",
    "optikit.plan",
    "optikit.recipe.load",
    "optikit.report.assemble",
    "optikit.report.summary",
    "optikit.report.write",
    "optikit.report.compare",
    "optikit.store.maintenance",
)


class Warm:
    """As many forking processes as there are cases at a time."""

    def __init__(self) -> None:
        self._idle: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        self._all: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        for _ in range(JOBS):
            command = [sys.executable, "-m", "tests.campaign.warm"]
            root = Path(__file__).parents[2]
            self._all.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
            )
            self._idle.put(self._all[-1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            process.communicate()

    def run(self, *arguments: str | Path, home: Path, cwd: Path, environ: Mapping[str, str] | None = None) -> Done:
        """Run a command to its end."""
        process = self._idle.get()
        try:
            with tempfile.TemporaryDirectory() as folder:
                out, err = Path(folder, "out"), Path(folder, "err")
                request = {
                    "arguments": [os.fsencode(str(each)).hex() for each in arguments],
                    "cwd": str(cwd),
                    "environ": environment(home) | dict(environ or {}),
                    "out": str(out),
                    "err": str(err),
                }
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                code = json.loads(process.stdout.readline())
                said = [path.read_text(encoding="utf-8", errors="backslashreplace") for path in (out, err)]
                return Done(code, *said)
        finally:
            self._idle.put(process)


def _command(request: dict[str, Any]) -> None:
    """Be a command, in a forked process; never returns."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(request["out"], os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(request["err"], os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.argv = ["optikit", *(os.fsdecode(bytes.fromhex(each)) for each in request["arguments"])]
    code = 1
    try:
        from optikit.cli.app import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:  # noqa: BLE001 - the interpreter would print it, too
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    from importlib import import_module

    from optikit.cli.app import VERBS

    for name in (*IMPORTED, *(f"optikit.cli.{verb}" for verb in VERBS)):
        import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _command(request)
        print(json.dumps(_code(pid)), flush=True)


def _code(pid: int) -> int | None:
    """Wait for a process; return its exit code, negative for a signal, None if it hung and was killed."""
    end = time.monotonic() + HANGS_S
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    _serve()
