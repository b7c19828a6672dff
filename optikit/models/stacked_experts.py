"""Checkpoints that hold all experts of a block in two tensors, seen as if each expert had its own.

    gate and up   (experts, 2 * width, hidden)    an expert's gate projection above its up projection
    down          (experts, hidden, width)

Every part of an expert is one run of bytes of them, so that it can be read, and compared, on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from optikit.errors import IntegrityError
from optikit.models.architectures import Architecture
from optikit.models.facts import TensorFacts

FIX = "the checkpoint is damaged or of another version: get it again, or save it with transformers"


def apart(
    architecture: Architecture, sizes: Mapping[str, int], tensors: Mapping[str, TensorFacts], where: Path
) -> dict[str, TensorFacts]:
    """Return the headers of a model with those of stacked experts taken apart.

    Args:
        architecture: Its family.
        sizes: Figures, with those of experts.
        tensors: Headers, under the names of the language model on its own.
        where: The directory, for messages.

    Raises:
        IntegrityError: A stacked tensor hasn't the shape that config.json describes, or lies across.
    """
    experts = architecture.experts
    if experts is None or not experts.stacked:
        return dict(tensors)
    wide, hidden, count = sizes["expert_width"], sizes["hidden"], sizes["experts"]
    wanted = dict(zip(experts.stacked, ((count, 2 * wide, hidden), (count, hidden, wide)), strict=True))
    found = {}
    for name, tensor in tensors.items():
        inside = inside_block(architecture, name).removesuffix(".weight")
        if inside not in wanted:
            found[name] = tensor
            continue
        if tensor.shape != wanted[inside]:
            across = " lies across: it" if tensor.shape == (count, *wanted[inside][:0:-1]) else ""
            message = f"{where}: {name}{across} has shape {tensor.shape}, and {wanted[inside]} is promised"
            raise IntegrityError(message, fix=FIX)
        for part, _, shape in slices(architecture, sizes, name):
            found[part] = TensorFacts(dtype=tensor.dtype, shape=shape)
    return found


def inside_block(architecture: Architecture, name: str) -> str:
    """Return a tensor's name relative to its block, "" outside of blocks."""
    rest = name.removeprefix(f"{architecture.blocks}.")
    return rest.partition(".")[2] if rest != name else ""


def slices(
    architecture: Architecture, sizes: Mapping[str, int], name: str
) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """Yield the parts of a stacked tensor in the order in which they lie.

    Args:
        architecture: A family with stacked experts.
        sizes: Figures, with those of experts.
        name: The stacked tensor, in the language model on its own.

    Yields:
        A part's name with `.weight`, the elements at which it begins and ends, and its shape.
    """
    experts = architecture.experts
    if experts is None:
        return
    inside = inside_block(architecture, name)
    block = name.removesuffix(inside)
    rows, columns, parts = sizes["expert_width"], sizes["hidden"], [0, 1]
    if inside.removesuffix(".weight") == experts.stacked[1]:
        rows, columns, parts = columns, rows, [2]
    at = 0
    for expert in range(sizes["experts"]):
        for part in parts:
            yield f"{block}{experts.linear(expert, part)}.weight", (at, at + rows * columns), (rows, columns)
            at += rows * columns
