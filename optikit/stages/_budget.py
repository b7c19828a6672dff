"""How much to train: `steps`, `epochs` or `tokens`, whichever the author writes; and how the learning rate goes on."""

from __future__ import annotations

from typing import Literal, cast

Unit = Literal["steps", "epochs", "tokens"]
Budget = tuple[Unit, int]
"""So many of them."""
Schedule = Literal["cosine", "constant"]
"""How the learning rate goes on after its warm-up: down to a tenth, or not at all."""


def budget(default: Budget, **given: int | None) -> Budget:
    """Return the one amount that is given.

    Args:
        default: Where none is given.
        given: By unit; None is not given.

    Raises:
        ValueError: More than one is given.
    """
    found = {unit: amount for unit, amount in given.items() if amount is not None}
    if len(found) > 1:
        raise ValueError(f"give one of {', '.join(given)}, not {' and '.join(found)}")
    return cast("Budget", next(iter(found.items()), default))
