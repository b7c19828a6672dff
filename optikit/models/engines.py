"""What an engine can compute, whatever the model's family and format: rows of engines.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine; an empty field isn't limited, or nobody asks.

    Attributes:
        ropes: Types of rotary embeddings that it knows.
        groups: Weights that may share a scale.
        head_widths: Channels that an attention head may have.
    """

    ropes: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    head_widths: tuple[int, ...] = ()


@cache
def _rows() -> Mapping[str, Engine]:
    text = resources.files("optikit.models").joinpath("engines.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)
    return {name: Engine(**{key: tuple(values) for key, values in row.items()}) for name, row in rows.items()}


def find(name: str) -> Engine:
    """Return an engine's row.

    Raises:
        KeyError: There is none: a fault of the package, found by its tests.
    """
    return _rows()[name]
