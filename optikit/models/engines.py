"""What an engine can compute, whatever the model's family and format: rows of engines.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine; an empty field isn't limited, or nobody asks.

    Attributes:
        ropes: Types of rotary embeddings → families that it rotates as transformers does.
        groups: Weights that may share a scale.
        head_widths: Channels that an attention head may have.
    """

    ropes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    head_widths: tuple[int, ...] = ()


@cache
def _rows() -> Mapping[str, Engine]:
    text = resources.files("optikit.models").joinpath("engines.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)
    found = {}
    for name, row in rows.items():
        ropes = MappingProxyType({kind: tuple(families) for kind, families in row.pop("ropes", {}).items()})
        found[name] = Engine(ropes=ropes, **{key: tuple(values) for key, values in row.items()})
    return MappingProxyType(found)


def find(name: str) -> Engine:
    """Return an engine's row.

    Raises:
        KeyError: There is none: a fault of the package, found by its tests.
    """
    return _rows()[name]


def rope_type(config: Mapping[str, Any]) -> str:
    """Return the type of rotary embeddings that config.json asks for, as transformers 5 or an older one wrote it.

    >>> rope_type({"rope_scaling": {"type": "linear", "factor": 2.0}}), rope_type({})
    ('linear', 'default')
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        return "default"
    kinds = {_kind(part) for part in found.values() if isinstance(part, dict)}  # one for each kind of attention
    return "+".join(sorted(kinds)) if kinds else _kind(found)


def _kind(parameters: Mapping[str, Any]) -> str:
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    return kind if parameters.get("partial_rotary_factor") in (None, 1) else f"{kind}, partial"
