"""Our own calls from the command line to the kernel of a method: `python tests/trace_call_path.py [recipe]`.

Runs a recipe through the public path, by default one stage of GPTQ on a tiny random model. Two stacks are looked at:
the main process where it starts the child of the step, and the worker's where the kernel is first entered. The child
is not started; its job folder is loaded and the worker's entry called in this process. Only frames of optikit count.

    --kernel MODULE:FUNCTION    what to wait for; the method is the module's last name
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "optikit"
KERNEL = "optikit.algorithms.gptq:_round_columns"
RECIPE = """\
model: {model}
target: cpu
calibration: {{text: {text}, samples: 4, length: 32}}
stages:
  - quantize: {{method: gptq, group_size: 32}}
"""


class Reached(BaseException):
    """Unwinds a run when the stack has been seen."""


def stack_of(frame: FrameType | None) -> list[str]:
    """Return the frames of optikit on a stack, outermost first, as `package.module.function  file:line`."""
    found = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            where = f"{path.relative_to(ROOT)}:{frame.f_code.co_firstlineno}"
            found.append(f"{module}.{frame.f_code.co_qualname}  {where}")
        frame = frame.f_back
    return found[::-1]


def stack_at(code: CodeType, run: Callable[[], Any], accept: Callable[[FrameType], bool] = lambda _: True) -> list[str]:
    """Run something until a function is entered; return the stack there.

    Args:
        code: Of the function.
        run: Unwound as soon as it is there.
        accept: Whether this is the call that is waited for.
    """
    found: list[str] = []

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not found and frame.f_code is code and accept(frame):
            found.extend(stack_of(frame))
            sys.setprofile(None)
            raise Reached

    sys.setprofile(look)
    try:
        run()
    except (Reached, SystemExit):
        pass
    finally:
        sys.setprofile(None)
    if not found:
        raise SystemExit(f"{code.co_qualname} was never called")
    return found


def tiny_recipe(place: Path) -> Path:
    """Write a tiny model, a text and a recipe of one stage."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import build_tiny_llama

    model, text, recipe = place / "model", place / "text.txt", place / "recipe.yaml"
    model.mkdir()
    build_tiny_llama(model)
    text.write_text("The old stone house stands near the cold green river.\n" * 200, encoding="utf-8")
    recipe.write_text(RECIPE.format(model=model, text=text), encoding="utf-8")
    return recipe


def to_the_child(recipe: Path, place: Path, method: str) -> tuple[list[str], dict[str, Any]]:
    """Return the main process's stack where it starts the child of `method`, and what it asks the child for."""
    request: dict[str, Any] = {}

    def asks(frame: FrameType) -> bool:
        command = frame.f_locals["args"]
        file = Path(os.fsdecode(command[-1])) / "request.json" if isinstance(command, list) else Path()
        if file.is_file():
            request.update(json.loads(file.read_text(encoding="utf-8")))
        return request.get("method") == method

    from optikit.cli import app

    sys.argv = ["optikit", "run", str(recipe), "--out", str(place / "out"), "--progress", "none"]
    start = subprocess.Popen.__init__.__code__
    return stack_at(start, app.main, asks), request


def to_the_kernel(request: dict[str, Any], place: Path, kernel: str) -> list[str]:
    """Return the worker's stack where the kernel is first entered, with the work of `request` in folders of our own."""
    from optikit.execution import worker

    module, _, function = kernel.partition(":")
    job = place / "job"
    for name in ("dest", "scratch"):
        (job / name).mkdir(parents=True)
        request[name] = str(job / name)
    (job / "request.json").write_text(json.dumps(request), encoding="utf-8")
    with redirect_stderr(io.StringIO()):  # the traceback of a job that was unwound
        return stack_at(getattr(importlib.import_module(module), function).__code__, lambda: worker.main(job))


def main() -> None:
    """Print both chains and how many calls they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path)
    parser.add_argument("--kernel", default=KERNEL)
    asked = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="trace-"))
    try:
        if asked.recipe is None:
            os.environ["OPTIKIT_HOME"] = str(place / "home")  # a model that nobody will want again
        recipe = asked.recipe or tiny_recipe(place)
        method = asked.kernel.partition(":")[0].rpartition(".")[2]
        main_process, request = to_the_child(recipe, place, method)
        worker = to_the_kernel(request, place, asked.kernel)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for name, chain in (("main process, down to where the child is started", main_process), ("worker", worker)):
        print(f"{name}: {len(chain)} calls")
        print("".join(f"  {index:2}  {call}\n" for index, call in enumerate(chain, start=1)))
    print(f"together: {len(main_process) + len(worker)} calls")


if __name__ == "__main__":
    main()
