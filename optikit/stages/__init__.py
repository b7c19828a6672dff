"""Stages: one technique per file, found by listing the directory; what the user types is the file name.

`registry()` is that listing; `backend_names()` lists the libraries that can do the same work as ours. A stage module is
a plain module that fits `stage.Stage`; there is nothing to register and no base class.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optikit.stage import Stage

VERBS = ("prune", "finetune", "quantize", "speculate", "compile")
"""The public verbs, in the usual order: each later one builds on final output of the earlier. Only finetune may also
come before prune."""

BACKENDS = Path(__file__).parent / "backends"

OURS = "optikit"
"""The backend that does every stage unless the recipe names another."""

REFUSED: Mapping[tuple[str, str, str], str] = MappingProxyType(
    {
        ("quantize", "gptq", "auto-gptq"): (
            "auto-gptq 0.7.1 quantizes with CUDA only, and its environment computes on the CPU (there it loads `gptq` "
            "directories)"
        ),
        ("quantize", "awq", "llm-compressor"): (
            "llm-compressor 0.14 does AWQ on an accelerator only, and its environment computes on the CPU"
        ),
    }
)
"""Libraries that have a method and can't do it here: (verb, method, backend) → why. Source: their own errors, "Load
pretrained model to do quantization requires CUDA available" and "Cannot access accelerator device when none is
available"."""


@cache
def methods(verb: str) -> tuple[str, ...]:
    """Names of the methods of a verb: the modules in its directory."""
    directory = Path(__file__).parent / verb
    names = (module.name for module in pkgutil.iter_modules([str(directory)]))
    return tuple(sorted(name.replace("_", "-") for name in names if not name.startswith("_")))


def method_key(verb: str) -> str:
    """Return the key of a recipe that names a verb's method: `engine` for compile, `method` for the rest."""
    return "engine" if verb == "compile" else "method"


def registry() -> Mapping[str, tuple[str, ...]]:
    """Every public verb with its methods."""
    return MappingProxyType({verb: methods(verb) for verb in VERBS})


@cache
def backend_names(verb: str, method: str) -> tuple[str, ...]:
    """Names of those who can do a method: optikit, and the modules `METHOD_NAME` in `optikit/stages/backends/`."""
    start = method.replace("-", "_") + "_"
    found = sorted(m.name for m in pkgutil.iter_modules([str(BACKENDS)]) if m.name.startswith(start))
    return (OURS, *(name.removeprefix(start).replace("_", "-") for name in found if verb == "quantize"))


def module(verb: str, method: str, backend: str = OURS) -> str:
    """Return the full name of a stage's module; a stage may also know its backends itself, as an option."""
    if backend == OURS or backend not in backend_names(verb, method):
        return f"optikit.stages.{verb}.{method.replace('-', '_')}"
    return f"optikit.stages.backends.{method}_{backend}".replace("-", "_")


def load(verb: str, method: str, backend: str = OURS) -> Stage:
    """Import a stage module; its heavy imports wait until `run`."""
    return cast("Stage", importlib.import_module(module(verb, method, backend)))
