"""What an engine can compute, whatever the model's family and format: rows of engines.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from optikit.models.facts import ModelFacts
from optikit.problems import Problem


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


def unlike(name: str, facts: ModelFacts) -> Iterator[Problem]:
    """Yield why an engine would rotate queries and keys of a model otherwise than transformers does."""
    rope, ropes = rope_type(facts.config), find(name).ropes
    if facts.model_type in ropes.get(rope, ()):
        return
    right = sorted(kind for kind, families in ropes.items() if facts.model_type in families)
    message = f"{name} doesn't rotate {facts.model_type} as transformers does where rope_type is {rope!r}"
    fix = f"serve the model directory itself, or use another engine; right here: {', '.join(right) or 'none'}"
    yield Problem(code="unknown-rope", message=message, fix=fix)


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
