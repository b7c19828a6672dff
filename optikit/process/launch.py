"""The first code of every child: ties it to its parent, then becomes the command. Standard library only.

    python -I -S launch.py tied PARENT COMMAND…   the kernel kills the command when PARENT ends (Linux)
    python -I -S launch.py kept BYTES COMMAND…    the command, and all that it started, ends when standard input closes

`tied` is the command itself, with its process id, so it can be stopped, continued and measured. A process that it
starts isn't tied. `kept` stays as the parent of a command that starts others: standard input is a pipe from whoever
wants it, so it closes however that one ends. The command gets ten seconds then, and the group is killed. When the
command ends first, so does its keeper, with its exit code, which for a signal is 128 and its number. Output that has
grown beyond BYTES is begun anew.
"""

from __future__ import annotations

import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    import threading

GRACE_SECONDS = 10.0
BOUND_SECONDS = 1.0
"""How often a keeper looks at the size of the output."""
PARENT = "OPTIKIT_PARENT"
"""Variable with the process id of a tied command, for processes that the command starts as its equals."""
CANNOT_START = 127
"""Exit code where the command isn't there, as a shell has it."""
_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Let the kernel kill this process when `parent`, its parent, ends; exit if that has happened already.

    The signal comes when the thread that started this process ends, and it survives exec, but not fork.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(128 + signal.SIGKILL)


def end_with_launched() -> None:
    """Tie this process to the tied command that started it, if it isn't that one: what torchrun starts is not tied."""
    launched = int(os.environ.get(PARENT, "0"))
    if launched not in (0, os.getpid()):
        end_with(launched)


def begin_anew(log: int, most_bytes: int) -> None:
    """Empty an open file, and say so in it, if it has more than `most_bytes`."""
    if os.fstat(log).st_size > most_bytes:
        os.ftruncate(log, 0)
        os.write(log, f"(more than {most_bytes >> 20} MiB before this were cut off)\n".encode())


def become(command: list[str]) -> None:
    """Run a command in place of this process."""
    os.environ[PARENT] = str(os.getpid())
    try:
        os.execvp(command[0], command)  # noqa: S606 - a shell would stand between the command and its parent
    except OSError as error:
        sys.stderr.write(f"{command[0]} can't be started: {error.strerror}\n")
        sys.exit(CANNOT_START)


def keep(command: list[str], most_bytes: int) -> int:
    """Run a command until it ends or standard input closes; return its exit code, of a signal 128 and its number."""
    import subprocess  # here: most children are tied, and have to start quickly
    import threading

    try:
        kept = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.stderr.write(f"{command[0]} can't be started: {error.strerror}\n")
        return CANNOT_START
    unwanted = threading.Event()
    threading.Thread(target=_end_when_unwanted, args=(kept, unwanted), daemon=True).start()
    threading.Thread(target=_bound, args=(most_bytes,), daemon=True).start()
    code = kept.wait()
    if unwanted.is_set():
        os.killpg(0, signal.SIGKILL)  # what the command started, and this process
    return code if code >= 0 else 128 - code


def _end_when_unwanted(kept: subprocess.Popen[bytes], unwanted: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    unwanted.set()
    kept.terminate()
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _bound(most_bytes: int) -> None:
    while True:
        time.sleep(BOUND_SECONDS)
        begin_anew(1, most_bytes)


def main(how: str, of: int, command: list[str]) -> int:
    """Start `command` in one of the two ways, which this module's first lines explain."""
    if how == "kept":
        return keep(command, of)
    end_with(of)
    become(command)
    return CANNOT_START


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
