"""config.json and its neighbours, read with suspicion: nothing in them may run code or stand for another repository.

Refused keys and why: `auto_map`, `trust_remote_code` and `model_file` name Python to import (CVE-2026-5843 for the
last); `_attn_implementation_internal` did so in transformers before 5.3 (CVE-2026-4372); an attention
implementation with a slash in it is fetched from the hub as a kernel; a tokenizer or processor named inside
`quantization_config` is fetched from another repository, code and all (optimum-intel issue 1510).
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optikit.errors import InputMissingError, RecipeError, RefusedError
from optikit.models.strict_json import read_object

RUNS_CODE = frozenset({"auto_map", "trust_remote_code", "model_file", "custom_pipelines"})
"""Keys that make some loader import Python that comes with the model."""
NAMES_REPOSITORY = frozenset(
    {"tokenizer", "tokenizer_id", "tokenizer_name", "tokenizer_name_or_path", "processor", "processor_id"}
    | {"assistant_model", "draft_model", "_attn_implementation", "attn_implementation", "_experts_implementation"}
)
"""Keys whose value, where it has a slash, makes some loader fetch another repository."""

MOST: Mapping[str, int] = MappingProxyType(
    {
        "hidden": 2**20,
        "intermediate": 2**22,
        "layers": 2**13,
        "heads": 2**14,
        "kv_heads": 2**14,
        "head_dim": 2**14,
        "vocab": 2**26,
        "max_positions": 2**31,
    }
)
"""Largest value of each figure that isn't absurd: several times what any published model has."""


def load(directory: Path) -> dict[str, Any]:
    """Read config.json of a model directory, after checking every `*config.json` there.

    Raises:
        InputMissingError: There is no config.json.
        IntegrityError: One of them isn't a JSON object.
        RefusedError: One of them would make a loader run code or fetch another repository.
    """
    if not (directory / "config.json").is_file():
        raise InputMissingError(f"{directory} has no config.json", fix="name a directory that transformers can load")
    if (directory / "adapter_config.json").exists():
        message = f"{directory} holds an adapter: transformers would load the base model that adapter_config.json names"
        raise RefusedError(message, fix="merge the adapter into its base model and save that")
    loaded = {}
    for path in sorted(directory.glob("*config.json")):
        loaded[path.name] = read_object(path)
        for key, value in _dangers(loaded[path.name]):
            message = f"{path}: {key} is {reprlib.repr(value)}, which makes loaders run foreign code"
            raise RefusedError(message, fix=f"remove {key} from the file, if the model works without it")
    return loaded["config.json"]


def _dangers(value: Any) -> Iterator[tuple[str, Any]]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from ((key, inner) for key, inner in item.items() if _is_dangerous(key, inner))
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _is_dangerous(key: str, value: Any) -> bool:
    if key in RUNS_CODE or key.endswith("_implementation_internal"):
        return bool(value)
    return key in NAMES_REPOSITORY and isinstance(value, str) and "/" in value


def figure(name: str, key: str, value: Any, where: Path) -> int:
    """Return a figure of a model if it is a sensible one.

    Args:
        name: Which figure of `ModelFacts`.
        key: What the file calls it.
        value: What the file says.
        where: The file.

    Raises:
        RecipeError: Naming key and value.
    """
    if type(value) is not int or not 1 <= value <= MOST[name]:
        message = f"{where}: {key} is {reprlib.repr(value)}; a whole number from 1 to {MOST[name]} is wanted"
        raise RecipeError(message, fix="the file is damaged, or not a decoder-only language model's")
    return value
