"""Tensors of a checkpoint with those of stacked experts taken apart, and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optikit.formats.checkpoint import Entry, made_of, part_of
from optikit.models import stacked_experts
from optikit.models.architectures import Architecture, Experts
from optikit.models.stacked_experts import Part


@dataclass(frozen=True)
class Cut:
    """Takes a projection out of an expert's run."""

    part: Part

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the projection, (out, in) or (out,)."""
        (run,) = tensors
        first, last, step = self.part.rows
        return (run.T if self.part.across else run)[first:last:step].contiguous()


@dataclass(frozen=True)
class Weave:
    """Puts an expert's projections together as its family holds them: gate and up, or down alone."""

    across: bool
    interleaved: bool

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return what (out, in) each, or biases (out,) each, make together."""
        whole = torch.stack(tuple(tensors), 1).flatten(0, 1) if self.interleaved else torch.cat(tuple(tensors))
        return (whole.T if self.across and whole.dim() > 1 else whole).contiguous()


def weave(experts: Experts, *, turned: bool = False) -> Weave:
    """Return how a family holds the projections of an expert together; `turned` where a file has them otherwise."""
    return Weave(experts.across != turned, experts.interleaved)


def sizes_of(row: Architecture, settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the figures of a family's experts from config.json of the language model; none where it has no experts."""
    if row.experts is None:
        return {}
    meant = row.meant(settings)
    keys = {"experts": row.experts.count, "expert_width": row.experts.width, "hidden": row.keys["hidden"]}
    return {name: int(meant[key]) for name, key in keys.items()}


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
    sizes = sizes_of(row, settings)
    for name, entry in entries.items():
        if stacked_experts.inside_block(row, name) in experts.stacked:
            del found[name]
            turned = stacked_experts.is_turned(row, sizes, name, entry.shape)
            found |= {part.name: _entry(entry, part) for part in stacked_experts.parts(row, sizes, name, turned=turned)}
    return found


def _entry(whole: Entry, part: Part) -> Entry:
    run = part_of(whole, part.elements, part.run)
    return run if part.in_one_piece else made_of([run], part.shape, Cut(part))


def grouped(row: Architecture, sizes: Mapping[str, int], name: str) -> list[list[str]]:
    """Return the names of the projections inside a stacked tensor, a list for each expert."""
    names = [part.name for part in stacked_experts.parts(row, sizes, name)]
    each = len(names) // sizes["experts"]
    return [names[start : start + each] for start in range(0, len(names), each)]
