"""A process that has imported all that optikit needs, and forks for every command and for every process of a step.

Importing torch takes longer than the work of any step here, so a kill at a random moment of a fresh interpreter hits an
import more often than not. What is forked is a process of its own all the same: its session, its parent's death, its
signals, its environment, open files and exit code are those of a new interpreter.

    python -m tests.campaign.forked     reads {"arguments", "cwd", "environ", "out", "err"} per line, answers with the
                                        process id and, when it has ended, with its exit code
"""

from __future__ import annotations

import atexit
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

BUILDER = "onnxruntime_genai.models.builder"
IMPORTED = (
    *("optikit.app.run", "optikit.app.recommend", "optikit.plan", "optikit.recipe.load", "optikit.report.assemble"),
    *("optikit.report.summary", "optikit.report.write", "optikit.report.compare", "optikit.store.maintenance"),
    *("optikit.execution.worker", "optikit.calibration.walk", "optikit.formats.loadable", "optikit.training"),
    *("torch", "torch._dynamo", "scipy.stats", "onnx", "onnxruntime", "onnxruntime_genai", "safetensors.torch", "peft"),
    *(BUILDER, "accelerate", "bitsandbytes", "tokenizers", "jinja2", "psutil", "sympy", "tensorboard"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.llama.modeling_llama", "transformers.models.bloom.modeling_bloom"),
    *("transformers.modeling_utils", "transformers.tokenization_utils_tokenizers"),
)
"""What commands and steps import; what isn't there under this name is imported by whoever wants it."""
FIRST_FREE, MOST_FILES = 3, 4096


class Forked(subprocess.Popen[bytes]):
    """Starts a module of optikit, or the model builder, in a forked process, and any other program as usual."""

    def _execute_child(self, args: Sequence[str], *how: Any) -> None:
        """Override how the standard library starts a program; see `subprocess.Popen._execute_child`, Python 3.11."""
        tied = _tied_module(args)
        if tied is None:
            super()._execute_child(args, *how)  # type: ignore[misc]  # private
            return
        cwd, env, pipes = how[4], how[5], how[9:15]
        ends = (pipes[0], pipes[3], pipes[5])  # its standard input, output and errors
        parent, module, arguments = tied
        self.pid = os.fork()
        if self.pid == 0:
            _become(lambda: _run_module(parent, module, arguments), cwd, env, ends)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]  # private


def _tied_module(args: Sequence[str]) -> tuple[int, str, list[str]] | None:
    """Return parent, module and arguments of `python … launch.py tied PARENT python [-P] -m optikit.… …`."""
    words = list(map(str, args))
    if len(words) < 9 or words[0] != sys.executable or words[4] != "tied" or words[6] != sys.executable:
        return None
    rest = [word for word in words[7:] if word != "-P"]
    if rest[0] != "-m" or not rest[1].startswith(("optikit.", BUILDER)):
        return None
    return int(words[5]), rest[1], rest[2:]


def _run_module(parent: int, module: str, arguments: list[str]) -> None:
    from optikit.process import launch

    launch.end_with(parent)
    os.environ[launch.PARENT] = str(os.getpid())
    sys.argv = [module, *arguments]
    warnings.simplefilter("ignore")  # that it is imported already
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _become(run: Callable[[], None], cwd: str | None, env: Mapping[str, str] | None, ends: tuple[int, ...]) -> None:
    """Be another program, in a forked process; never returns."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        for wanted, have in enumerate(ends):
            if have != -1:
                os.dup2(have, wanted)
        os.closerange(FIRST_FREE, MOST_FILES)
        sys.stdin, sys.stdout, sys.stderr = (_text(number) for number in range(FIRST_FREE))
        if cwd is not None:
            os.chdir(cwd)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        run()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:  # noqa: BLE001 - the interpreter would print it, too
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _text(number: int) -> io.TextIOWrapper:
    binary = open(number, "rb" if number == 0 else "wb", closefd=False)  # noqa: SIM115 - a descriptor's
    return io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _command(request: dict[str, Any]) -> None:
    """Be `optikit …`, in a forked process; never returns."""
    ends = (
        os.open(os.devnull, os.O_RDONLY),
        os.open(request["out"], os.O_WRONLY | os.O_CREAT),
        os.open(request["err"], os.O_WRONLY | os.O_CREAT),
    )

    def run() -> None:
        from optikit.cli.app import main
        from optikit.process import child

        child.subprocess.Popen = Forked  # type: ignore[misc]
        sys.argv = ["optikit", *(os.fsdecode(bytes.fromhex(each)) for each in request["arguments"])]
        main()

    _become(run, request["cwd"], request["environ"], ends)


def main() -> None:
    """Import, then fork for every request."""
    from optikit.cli.app import VERBS

    for name in (*IMPORTED, *(f"optikit.cli.{verb}" for verb in VERBS)):
        with suppress(ImportError):
            import_module(name)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _command(request)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
