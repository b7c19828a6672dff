"""Bundles: how each server is started on an artifact, one module per server, named as in `deploy.servers`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from optikit.deploy.bundle import Bundled


@cache
def names() -> tuple[str, ...]:
    """Return the servers that have a bundle."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return tuple(sorted(name.replace("_", "-") for name in found if not name.startswith("_")))


@cache
def bundled(name: str) -> Bundled:
    """Return the module of a server's bundle."""
    return cast("Bundled", importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
