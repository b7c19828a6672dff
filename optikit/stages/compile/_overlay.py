"""A model's configuration in words that transformers 4.57 and 5 both understand, for servers that bring either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optikit.models.strict_json import read_object

OVERLAID = ("config.json", "generation_config.json", "tokenizer_config.json")
"""Files whose words changed between the two."""


def overlay(source: Path, dtype: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and contents of a model directory's configuration files.

    Args:
        source: Hugging Face directory.
        dtype: Dtype that config.json shall name, e.g. `bfloat16`; empty leaves it.

    Raises:
        IntegrityError: One of them isn't a JSON object.
    """
    for name in OVERLAID:
        if (source / name).is_file():
            yield name, for_both(read_object(source / name), dtype)


def for_both(settings: Mapping[str, Any], dtype: str = "") -> dict[str, Any]:
    """Return a configuration that transformers 4.57 and 5 read alike.

    Without this, 4.57 would find no `rope_theta` in what 5 wrote and take 10000, silently.
    """
    found = dict(settings)
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        found["rope_theta"] = rope["rope_theta"]
        found["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    named = dtype or found.get("dtype") or found.get("torch_dtype")
    if "model_type" in found and named:
        found |= {"dtype": named, "torch_dtype": named}
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("backend", "is_local", "local_files_only"):
            found.pop(key, None)
    return found
