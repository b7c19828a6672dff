"""config.json of a model directory, and the figures in it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optikit.errors import InputMissingError, RecipeError
from optikit.models import intake
from optikit.models.strict_json import read_object

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
        "experts": 2**14,
        "experts_chosen": 2**14,
        "expert_width": 2**22,
    }
)
"""Largest value of each figure that isn't absurd: several times what any published model has."""


MOST_PARAMETERS = 10**14
"""Weights of a model above which its figures can't be true together: fifty times the largest one published."""
DTYPES: Mapping[str, str] = MappingProxyType({"float16": "F16", "float32": "F32", "bfloat16": "BF16"})
"""Dtypes of weights as config.json and as safetensors name them."""


def dtype(settings: Mapping[str, Any]) -> str:
    """Return the safetensors name of the dtype that config.json gives weights; bfloat16 where it gives none."""
    inner = settings.get("text_config")
    sections = (settings, inner if isinstance(inner, dict) else {})
    found = next((each[key] for each in sections for key in ("dtype", "torch_dtype") if each.get(key)), "")
    told = str(found).removeprefix("torch.")
    return DTYPES.get(told, "BF16")


def load(directory: Path) -> dict[str, Any]:
    """Read config.json of a model directory, behind the door (`intake.require_harmless`).

    Raises:
        InputMissingError: There is no config.json.
        IntegrityError: It, or a configuration beside it, isn't a JSON object.
        RefusedError: One of them would make a loader run code or fetch another repository.
    """
    if not (directory / "config.json").is_file():
        raise InputMissingError(f"{directory} has no config.json", fix="name a directory that transformers can load")
    intake.require_harmless(directory)
    return read_object(directory / "config.json")


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
