"""What corrected weights were aimed at, in a few numbers a row: so that files can be held to it once it is gone.

A corrected weight T isn't in the source, and all of them would fill a disk. Kept is T R for a fixed random R, (in, 16)
of standard normals: of the written weight N, |(N - T) R|² / 16 is |N - T|² on average (Johnson & Lindenstrauss 1984),
and rows err independently.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

NUMBERS = 16
"""Numbers a row: the error of a 64-row weight comes out within 5 %."""
SCALE = ".scale"
"""Ends the name of what a group's inputs are divided by."""


def _projection(width: int) -> Tensor:
    return torch.randn((width, NUMBERS), generator=torch.Generator().manual_seed(0))


def kept(names: Iterable[str], weights: Iterable[Tensor], scale: Tensor | None = None) -> dict[str, Tensor]:
    """Return what to keep of weights.

    Args:
        names: Full names of linears.
        weights: Per linear (out, in) float32: what is rounded.
        scale: (in,) that the weights were multiplied by before, and their inputs are divided by.

    Returns:
        (out, 16) float32 by name; and the scale.
    """
    found: dict[str, Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        found[name] = seen(weight)
        if scale is not None:
            found[f"{name}{SCALE}"] = scale.clone()  # a file holds no tensor twice
    return found


def seen(weight: Tensor) -> Tensor:
    """Return a weight (out, in) as aims are kept, (out, 16)."""
    return weight @ _projection(weight.shape[1]).to(weight.device)
