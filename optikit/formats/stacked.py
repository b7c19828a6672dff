"""Tensors of a checkpoint with those of stacked experts taken apart: each part where its bytes lie in the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optikit.formats.checkpoint import Entry, part_of
from optikit.models import stacked_experts
from optikit.models.architectures import Architecture


def apart(row: Architecture, settings: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return tensors by name, an expert's in place of all experts'.

    Args:
        row: The family.
        settings: config.json of the language model.
        entries: Under the names of the language model on its own.
    """
    experts, found = row.experts, dict(entries)
    if experts is None or not experts.stacked:
        return found
    meant = row.meant(settings)
    sizes = {"experts": meant[experts.count], "expert_width": meant[experts.width], "hidden": meant[row.keys["hidden"]]}
    for name, entry in entries.items():
        if stacked_experts.inside_block(row, name).removesuffix(".weight") in experts.stacked:
            del found[name]
            for part, elements, shape in stacked_experts.slices(row, sizes, name):
                found[part] = part_of(entry, elements, shape)
    return found
