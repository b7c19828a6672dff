"""Which server loads which speculator and which weights: rows of support.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Support:
    """One row: `server` in `versions` (PEP 440) loads `what`; `basis` says how we know."""

    what: str
    server: str
    versions: str
    basis: Literal["tested", "source", "derived"]
    note: str
    source: str


@cache
def rows() -> tuple[Support, ...]:
    """Return all rows."""
    text = resources.files("optikit.deploy").joinpath("support.toml").read_text(encoding="utf-8")
    return tuple(Support(**row) for row in tomllib.loads(text)["row"])


def loads_in(what: str) -> dict[str, str]:
    """Return the servers that load a speculator or weights, with their versions: the manifest's `loads_in`.

    >>> loads_in("nxdi")
    {'neuronx-distributed-inference': '<=2.33'}
    """
    return {row.server: row.versions for row in rows() if row.what == what}
