"""A model directory made from another: same tokenizer, new weights, configuration with what changed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from optikit.formats.checkpoint import Entry, write_shards
from optikit.models import tokenizer

COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "LICENSE",
    "LICENSE.txt",
)
"""Files that go along unchanged, beside chat templates with names. Nothing else does: no code, no other weights."""


def write_model(source: Path, dest: Path, entries: Mapping[str, Entry], *, changes: Mapping[str, Any]) -> None:
    """Write a model directory.

    Args:
        source: Directory whose configuration and tokenizer are taken over.
        dest: Existing directory.
        entries: Every tensor and where its bytes lie.
        changes: Keys of config.json that are new or different.
    """
    write_config(source, dest, changes=changes)
    write_shards(dest, entries)


def write_config(source: Path, dest: Path, *, changes: Mapping[str, Any], without: Collection[str] = ()) -> None:
    """Write what goes with the weights: config.json with some keys changed and others taken out, and the tokenizer."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in without}
    (dest / "config.json").write_text(json.dumps({**kept, **changes}, indent=2) + "\n", encoding="utf-8")
    tokenizer.copy(source, dest, COMPANIONS)
