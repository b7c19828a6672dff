"""`python -m optikit.stages.compile._onnx_child PARENT MODULE ARGUMENTS…`: run a module that dies with its parent.

A worker that is killed must not leave a builder behind that goes on writing into a directory nobody waits for.
"""

from __future__ import annotations

import os
import runpy
import sys

from optikit.worker import die_with_parent


def main(parent: int, module: str, *arguments: str) -> None:
    """Run `module` as the program, unless the process `parent` has died already."""
    die_with_parent()
    if os.getppid() == parent:  # else it died before the kernel was told
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
